"""The documents of the standard library are the same in every process of one Python."""

import builtins
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from megatron_nexus.data.standard_library import module_document, standard_library_documents

SCRIPT = """
import hashlib
from megatron_nexus.data.standard_library import standard_library_documents
hashes = sorted(hashlib.sha256(text.encode()).hexdigest() for text in standard_library_documents())
print(hashlib.sha256("".join(hashes).encode()).hexdigest())
"""


def test_they_do_not_depend_on_the_process() -> None:
    hashes = sorted(hashlib.sha256(text.encode()).hexdigest() for text in standard_library_documents())
    here = hashlib.sha256("".join(hashes).encode()).hexdigest()
    elsewhere = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert elsewhere.stdout.strip() == here


def test_a_built_in_module_is_told_by_its_docstrings() -> None:
    text = module_document(builtins)
    assert "builtins.abs\nReturn the absolute value" in text
    assert "builtins.str.upper\n" in text
    assert "builtins.IOError" not in text, "an alias of OSError"
