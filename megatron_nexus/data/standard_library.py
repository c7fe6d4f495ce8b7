"""The texts that every machine has: the standard library of the Python that runs."""

import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

# pydoc_data is the source of the topics, which are documents of their own.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def standard_library_documents() -> Iterator[str]:
    """Yield every source file, `pydoc` topic and built-in module of this Python, one document each."""
    yield from source_documents(Path(sysconfig.get_path("stdlib")))
    yield from topics.values()
    for name in sys.builtin_module_names:
        yield module_document(importlib.import_module(name))


def source_documents(root: Path) -> Iterator[str]:
    """Yield the `.py` files below `root`, without installed packages and files that are not UTF-8."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                try:
                    yield Path(folder, name).read_bytes().decode()
                except UnicodeDecodeError:
                    continue


def module_document(module: ModuleType) -> str:
    """Return the docstrings of a built-in module, of its public functions and classes and of their methods.

    Leaves out what depends on the process: values, aliases, and members that others have put there.
    """
    entries = [(module.__name__, module.__doc__)]
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__name__", None) != name:
            continue
        if name.endswith("hook"):  # sys.excepthook and its like are there to be replaced
            continue
        if inspect.isbuiltin(member):
            entries.append((f"{module.__name__}.{name}", member.__doc__))
        elif inspect.isclass(member) and member.__module__.partition(".")[0] in sys.stdlib_module_names:
            entries.append((f"{module.__name__}.{name}", member.__doc__))
            entries += [
                (f"{module.__name__}.{name}.{method_name}", method.__doc__)
                for method_name, method in sorted(vars(member).items())
                if inspect.isroutine(method) and not method_name.startswith("_")
            ]
    return "\n\n".join(f"{name}\n{inspect.cleandoc(text)}" for name, text in entries if text) + "\n"
