"""A small model with a tokenizer, for the tests of evaluation: random weights, written as two ranks would."""

from pathlib import Path

import torch

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.sentencepiece_tokenizer import train_sentencepiece_bpe
from megatron_nexus.evaluation.loaded_model import LoadedModel, load_model
from tests.support import checkpoints

SEQ_LENGTH = 48
PIECES = 400
TEXTS = [
    f"{who} {does} the {what} {where}. Question: why? Answer: \U0001f600 it was {what}, na\u00efve {who}!\n"
    for who in ("She", "A boy", "The old man", "Nobody")
    for does in ("opens", "sees", "paints", "forgets")
    for what in ("door", "river", "green house", "answer")
    for where in ("at night", "in the garden", "with a knife", "before lunch")
]


def write_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.model"
    train_sentencepiece_bpe(TEXTS, path, vocab_size=PIECES)
    return path


def write_run(root: Path, tokenizer: Path, **options: object) -> tuple[Path, RunConfig]:
    """A run's folder with one checkpoint, and its configuration."""
    own = {"seq_length": SEQ_LENGTH, "data_path": ("corpus",), "tokenizer_model": str(tokenizer)}
    config = checkpoints.configure(**{**own, "vocab_size": PIECES + 16, **options})
    return checkpoints.write_checkpoint(root, config, tp=2), config


def load(checkpoint: Path, config: RunConfig, dtype: torch.dtype = torch.float64) -> LoadedModel:
    return load_model(checkpoint, config.model, config.training.seq_length, torch.device("cpu"), dtype)
