"""Libraries of many corpora: all of them are open at once."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.config.command_line import build
from megatron_nexus.data.corpus_description import CorpusDescription
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.data.run_data import RunData, training_sources
from megatron_nexus.data.tokenizer_record import TokenizerRecord
from megatron_nexus.errors import DataError
from tests.support.paths import REPOSITORY

CORPORA = 320
OPEN_ALL = """
import sys
from pathlib import Path
from megatron_nexus.config.command_line import build
from megatron_nexus.data.run_data import RunData, training_sources
from megatron_nexus.errors import DataError

prefixes = sorted(str(path.with_suffix("")) for path in Path(sys.argv[1]).glob("*.idx"))
config = build({"data_path": tuple(prefixes), "split": "1,1", "seq_length": 8, "vocab_size": 61})
try:
    run_data = RunData(config, training_sources(config.data), None)
except DataError as error:
    sys.exit(str(error))
print(len(run_data.datasets), run_data.training.sample(len(prefixes)).tolist())
"""


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (4096, f"{CORPORA} [0, 1, 2, 3, 4, 5, 6, 7, 8]"),
        (600, "cannot be opened (Too many open files): raise the limit"),
    ],
)
@pytest.mark.slow
def test_a_blend_may_have_more_corpora_than_files_are_open_at_first(
    tmp_path: Path, most: int, expected: str
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
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def run_data(folder: Path, **flags: str | int | tuple[str, ...]) -> RunData:
    """Of the corpora `large`, of 100 documents, and `small`, of 3: by the built-in split all for training."""
    for name, documents in (("large", 100), ("small", 3)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for _ in range(documents):
                writer.add_document(range(40))
    blend = ("0.999", str(folder / "large"), "0.001", str(folder / "small"))
    config = build({"data_path": blend, "seq_length": 8, "vocab_size": 61, **flags})
    return RunData(config, training_sources(config.data), None)


def test_a_corpus_without_validation_documents_is_told_and_the_others_are_validated_on(
    tmp_path: Path,
) -> None:
    found = run_data(tmp_path)
    assert found.without_validation == [tmp_path / "small"]
    assert [part.dataset.prefix for part in found.evaluations["validation"].parts] == [tmp_path / "large"]
    assert len(found.training.parts) == 2


@pytest.mark.parametrize(
    "flags", [{"split": "1,0,0"}, {"split": "1"}, {"split": "99,0,1"}, {"eval_iters": 0}]
)
def test_a_run_can_do_without_validation(tmp_path: Path, flags: dict[str, str | int]) -> None:
    found = run_data(tmp_path, **flags)
    assert found.evaluations == {} and found.without_validation == []
    alone = run_data(tmp_path, data_path=(str(tmp_path / "small"),), **flags)
    assert alone.evaluations == {}


def test_data_of_which_nothing_is_left_for_validation_is_refused_with_both_remedies(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"validation part of .*small has 0 tokens.*--split.*or --eval-iters 0"
    ):
        run_data(tmp_path, data_path=(str(tmp_path / "small"),))


def described(prefix: Path, fingerprint: str) -> str:
    """Write a corpus that says which tokenizer wrote it, or nothing where there is no fingerprint."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(100):
            writer.add_document(range(40))
        if fingerprint:
            writer.description = CorpusDescription(
                "t.model", fingerprint, 61, 1, True, "text", "file", 1, 1, 100, 4000, 4000, 0, {}, []
            ).to_json()
    return str(prefix)


def test_a_corpus_of_another_tokenizer_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    of_a, of_b, silent = (described(tmp_path / f"of-{name}", name) for name in ("a", "b", ""))

    def opened(*prefixes: str) -> RunData:
        config = build({"data_path": prefixes, "seq_length": 8, "vocab_size": 61, "split": "1,1"})
        return RunData(config, training_sources(config.data), None)

    opened(of_a).require_tokenizer(TokenizerRecord("a"))
    opened(of_a).require_tokenizer(TokenizerRecord())
    opened(silent).require_tokenizer(TokenizerRecord("a"))
    assert opened(of_b, silent).tokenizer_fingerprint == "b"
    with pytest.raises(DataError, match=r"sha256 b\).*the checkpoint was trained with \(a\).*preprocess"):
        opened(of_b, silent).require_tokenizer(TokenizerRecord("a"))
    with pytest.raises(DataError, match=r"two tokenizers.*preprocess one of them again"):
        opened(of_a, of_b)
