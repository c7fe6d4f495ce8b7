"""The tokenizer of a checkpoint is the one that its run had, or an error, or none."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.checksummed_json import dumps_with_crc
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, RunProgress, manifest_to_json, read_manifest
from megatron_nexus.config.command_line import build
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.errors import DataError
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from tests.support import checkpoints

TEXTS = ["for i in range(3):\n    print(i)\n", "The quick brown fox jumps over the lazy dog.\n"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    for vocab_size in (310, 312):
        train_sentencepiece_bpe(TEXTS, folder / f"{vocab_size}.model", vocab_size)
    return [folder / "310.model", folder / "312.model"]


def test_the_settings_name_it_and_the_user_may_say_where_it_is_now(models: list[Path]) -> None:
    first = SentencePieceTokenizer(models[0])
    named = build({"vocab_size": 311, "data_path": ("corpus",), "tokenizer_model": str(models[0])})
    moved = build({"vocab_size": 311, "data_path": ("corpus",), "tokenizer_model": "gone.model"})
    nameless = build({"vocab_size": 311, "data_path": ("corpus",)})
    for config, given in ((named, None), (moved, models[0]), (nameless, models[0])):
        found = find_tokenizer(config, TokenizerRecord(first.fingerprint), given)
        assert found is not None and found.fingerprint == first.fingerprint
    assert find_tokenizer(nameless, NO_RECORD) is None
    assert find_tokenizer(build({}), NO_RECORD) is None, "no run on the built-in corpus is without one"
    with pytest.raises(DataError, match=r"gone\.model.*--tokenizer-model"):
        find_tokenizer(moved, TokenizerRecord(first.fingerprint))


def test_another_one_is_refused(models: list[Path]) -> None:
    config = build({"vocab_size": 311, "data_path": ("corpus",), "tokenizer_model": str(models[0])})
    with pytest.raises(DataError, match=r"is not the one that the checkpoint was trained with"):
        find_tokenizer(config, TokenizerRecord("0" * 64))
    with pytest.raises(DataError, match="has 312 tokens, the model 311"):
        find_tokenizer(config, NO_RECORD, models[1])


def test_that_of_the_built_in_corpus_is_found_by_its_fingerprint(models: list[Path], tmp_path: Path) -> None:
    for number, model in enumerate(models):
        folder = tmp_path / f"python-stdlib-{number}"
        folder.mkdir()
        shutil.copy(model, folder / "tokenizer.model")
    config = build({"vocab_size": 312, "data_cache_path": str(tmp_path)})
    for model in models:
        fingerprint = SentencePieceTokenizer(model).fingerprint
        found = find_tokenizer(config, TokenizerRecord(fingerprint))
        assert found is not None and found.fingerprint == fingerprint


def test_checkpoints_from_before_the_choice_go_on_without_bos_and_imports_as_their_tokenizer_says(
    tmp_path: Path,
) -> None:
    checkpoint = checkpoints.write_checkpoint(tmp_path, checkpoints.configure())
    manifest = dataclasses.replace(read_manifest(checkpoint), prepend_bos=True)
    for step, expected in ((40, False), (0, None)):
        done = dataclasses.replace(manifest, progress=RunProgress(step, 4 * step, 100 * step, 10**9))
        (checkpoint / MANIFEST_FILE).write_text(manifest_to_json(done))
        assert read_manifest(checkpoint).prepend_bos is True
        record = json.loads(manifest_to_json(done))
        record = {name: value for name, value in record.items() if name not in ("prepend_bos", "crc32")}
        (checkpoint / MANIFEST_FILE).write_text(dumps_with_crc(record, indent=1))
        assert tokenizer_record(read_manifest(checkpoint)).prepend_bos is expected
