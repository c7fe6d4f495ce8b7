"""The documents of the standard library are the same in every process of one Python."""

import builtins
import os
import subprocess
import sys

import pytest

from megatron_nexus.data.standard_library import module_document
from tests.support.paths import REPOSITORY

SCRIPT = """
import hashlib
from megatron_nexus.data.standard_library import standard_library_documents
hashes = sorted(hashlib.sha256(text.encode()).hexdigest() for text in standard_library_documents())
print(hashlib.sha256("".join(hashes).encode()).hexdigest())
"""


@pytest.mark.law
def test_they_do_not_depend_on_the_process() -> None:
    """In processes of their own: W&B replaces sys.exit in one that logs to it, as a test before this may."""
    plain, other = (
        subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed},
        ).stdout
        for code, seed in ((SCRIPT, "1"), ("import torch\n" + SCRIPT, "2"))
    )
    assert len(plain.strip()) == 64
    assert other == plain


def test_a_built_in_module_is_told_by_its_docstrings() -> None:
    text = module_document(builtins)
    assert "builtins.abs\nReturn the absolute value" in text
    assert "builtins.str.upper\n" in text
    assert "builtins.IOError" not in text, "an alias of OSError"
