"""What the package's sources say: imports, attributes and strings of each file, parsed once in a process."""

import ast
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "megatron_nexus"
STANDALONE = PACKAGE / "interchange" / "remote_code"
"""Copied into what is exported, to run where this package is not."""
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if STANDALONE not in path.parents)


@dataclass(frozen=True)
class Source:
    """A file: the modules and names that it imports, functions included, and what else its tests look for."""

    imports: set[str] = field(default_factory=set)
    reads: set[tuple[str, str]] = field(default_factory=set)
    """`("training", "seed")` of `config.training.seed` and of `training.seed`."""
    globals_and_prints: list[int] = field(default_factory=list)
    """Lines with a `global` statement or a call of `print`."""
    strings: list[str] = field(default_factory=list)
    """All string constants, docstrings too."""
    messages: list[str] = field(default_factory=list)
    """The same and f-strings, with a NUL for each value that is put into them."""


@functools.cache
def source(path: Path) -> Source:
    """Return what a file says."""
    found = Source()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import():
                found.imports.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0 or STANDALONE in path.parents, f"{path}:{node.lineno} is relative"
                module = "." * node.level + (node.module or "")
                found.imports.update((module, *(f"{module}.{alias.name}" for alias in node.names)))
            case ast.Attribute(ctx=ast.Load()):
                inner = node.value
                base = inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", "")
                found.reads.add((base, node.attr))
            case ast.Global() | ast.Call(func=ast.Name(id="print")):
                found.globals_and_prints.append(node.lineno)
            case ast.Constant(value=str(text)):
                found.strings.append(text)
                found.messages.append(_template(node))
            case ast.JoinedStr():
                found.messages.append(_template(node))
    return found


def _template(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[-\d.]*[sdfe]", "\0", text)
        case ast.JoinedStr(values=values):
            return "".join(map(_template, values))
        case _:
            return "\0"
