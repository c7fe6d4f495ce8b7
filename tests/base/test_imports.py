"""Hidden modules cannot be imported inside, and can be imported again afterwards."""

import importlib
import sys

import pytest

from megatron_nexus.base.imports import hidden_modules


def test_a_hidden_module_is_missing_inside_alone() -> None:
    with hidden_modules("json", "antigravity"):
        assert importlib.import_module("json") is sys.modules["json"], "it was there before"
        with pytest.raises(ImportError):
            importlib.import_module("antigravity")
    assert "antigravity" not in sys.modules
