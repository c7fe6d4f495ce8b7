"""The tokenizer of a checkpoint is found again, and no other is taken for it."""

import dataclasses
import shutil
from pathlib import Path

import grown
import pytest

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.trained_tokenizer import open_trained_tokenizer
from megatron_nexus.errors import DataError

TEXTS = ["one two three four five six", "seven eight nine ten eleven"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[SentencePieceTokenizer]:
    folder = tmp_path_factory.mktemp("models")
    made = []
    for size in (290, 291):
        train_sentencepiece_bpe(TEXTS, folder / f"{size}.model", size)
        made.append(SentencePieceTokenizer(folder / f"{size}.model"))
    return made


def configured(**data: object) -> RunConfig:
    config = grown.configure(vocab_size=300)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def test_it_is_where_the_run_had_it_or_where_it_is_given(
    models: list[SentencePieceTokenizer], tmp_path: Path
) -> None:
    right, wrong = models
    config = configured(data_path=("corpus",), tokenizer_model=str(right.model_path))
    assert open_trained_tokenizer(config, right.fingerprint).fingerprint == right.fingerprint
    moved = configured(data_path=("corpus",), tokenizer_model=str(tmp_path / "gone.model"))
    with pytest.raises(DataError, match=r"gone\.model, which is not here: .*--tokenizer-model"):
        open_trained_tokenizer(moved, right.fingerprint)
    found = open_trained_tokenizer(moved, right.fingerprint, str(right.model_path))
    assert found.fingerprint == right.fingerprint
    with pytest.raises(DataError, match="is not the tokenizer of the checkpoint"):
        open_trained_tokenizer(moved, right.fingerprint, str(wrong.model_path))


def test_that_of_the_built_in_corpus_is_found_by_its_fingerprint(
    models: list[SentencePieceTokenizer], tmp_path: Path
) -> None:
    for model in models:
        folder = tmp_path / f"python-stdlib-{model.fingerprint[:12]}"
        folder.mkdir()
        shutil.copy(model.model_path, folder / "tokenizer.model")
    config = configured(data_cache_path=str(tmp_path))
    for model in models:
        assert open_trained_tokenizer(config, model.fingerprint).fingerprint == model.fingerprint
    with pytest.raises(DataError, match=r"holds no tokenizer of its kind .*copy python-stdlib"):
        open_trained_tokenizer(config, "0" * 64)


def test_tokens_of_an_unknown_tokenizer_need_one_that_fits(models: list[SentencePieceTokenizer]) -> None:
    config = configured(data_path=("corpus",))
    with pytest.raises(DataError, match="without a tokenizer: give --tokenizer-model"):
        open_trained_tokenizer(config, "")
    given = str(models[0].model_path)
    assert open_trained_tokenizer(config, "", given).vocab_size == 290
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(DataError, match="290 tokens, the model 100"):
        open_trained_tokenizer(small, "", given)
