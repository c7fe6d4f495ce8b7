"""The small model with a tokenizer that the tests of evaluation share."""

from pathlib import Path

import pytest

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.evaluation.loaded_model import LoadedModel
from tests.support.eval_model import load, write_run, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def run(
    tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig]:
    return write_run(tmp_path_factory.mktemp("evaluated") / "run", tokenizer.model_path)


@pytest.fixture(scope="session")
def loaded(run: tuple[Path, RunConfig]) -> LoadedModel:
    return load(*run)
