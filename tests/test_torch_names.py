"""Law: every name of torch's that the package says exists in the torch that runs, private ones above all.

What begins with an underscore may go in any release; what is public is looked up too, since an older torch
may not have it yet.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.torch_versions
PACKAGE = REPOSITORY / "megatron_nexus"


def names_of_torch(path: Path) -> Iterator[str]:
    """Dotted names of torch: of imports, and of attributes of what imports bind."""
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text))) if "torch" in text else []
    bound: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield alias.name
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner: ast.expr = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in bound:
                yield ".".join([bound[inner.id], *reversed(parts)])


def exists(name: str) -> bool:
    """Whether a dotted name can be imported, or reached from a module by its attributes."""
    found: object = None
    for index, part in enumerate(name.split(".")):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                importlib.import_module(".".join(name.split(".")[: index + 1]))
            except ImportError:
                return False
        if found is not None and not hasattr(found, part):
            return False
        found = getattr(found, part) if found is not None else importlib.import_module(part)
    return True


def test_every_name_of_torch_exists() -> None:
    names = {name for path in PACKAGE.rglob("*.py") for name in names_of_torch(path)}
    private = {name for name in names if any(part.startswith("_") for part in name.split("."))}
    assert "torch.distributed.distributed_c10d._get_default_store" in private
    assert "torch._subclasses.fake_tensor.FakeTensorMode" in private
    assert [name for name in sorted(names) if not exists(name)] == []


@pytest.mark.parametrize(
    "name", ["torch.nothing", "torch._C._nothing", "torch.nothing.at.all", "torch.nn._x"]
)
def test_a_name_that_is_gone_is_found(name: str) -> None:
    assert not exists(name)
