"""Libraries of many corpora: all of them are open at once."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import REPOSITORY

from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter

CORPORA = 320
OPEN_ALL = """
import sys
from pathlib import Path
from megatron_nexus.config.command_line import build
from megatron_nexus.data.library import Library, training_sources
from megatron_nexus.errors import DataError

prefixes = sorted(str(path.with_suffix("")) for path in Path(sys.argv[1]).glob("*.idx"))
config = build({"data_path": tuple(prefixes), "split": "1,1", "seq_length": 8, "vocab_size": 61})
try:
    library = Library(config, training_sources(config.data), None)
except DataError as error:
    sys.exit(str(error))
print(len(library.datasets), library.training.sample(len(prefixes)).tolist())
"""


@pytest.mark.parametrize(
    ("most", "told"),
    [
        (4096, f"{CORPORA} [0, 1, 2, 3, 4, 5, 6, 7, 8]"),
        (600, "cannot be opened (Too many open files): raise the limit"),
    ],
)
def test_a_blend_may_have_more_corpora_than_files_are_open_at_first(
    tmp_path: Path, most: int, told: str
) -> None:
    for number in range(CORPORA):
        with IndexedDatasetWriter(tmp_path / f"c{number}", np.uint16) as writer:
            for _ in range(2):
                writer.add_document(range(9))
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, most)),
    )
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
