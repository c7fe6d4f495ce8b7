"""A model of others, as the importer sees it: what it is, and its weights, some rows at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_nexus.interchange.architecture import JsonObject

Array = npt.NDArray[np.float32]


class Weights(Protocol):
    """Tensors under their names in Hugging Face's files."""

    shapes: Mapping[str, tuple[int, ...]]

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """Return rows [first, last), or a vector's elements, as float32. Raises CheckpointError."""
        ...


class TokenizerWriter(Protocol):
    """Writes the model's tokenizer as `open_tokenizer` finds it in a folder."""

    def __call__(self, folder: Path) -> None:
        """Write the tokenizer into a folder. Raises DataError, OSError."""
        ...


@dataclass(frozen=True)
class SourceModel:
    """A model in files of others.

    `config` is Hugging Face's `config.json`, or its equivalent. `write_tokenizer` is None where there is
    no tokenizer.
    """

    name: str
    format: str
    config: JsonObject
    weights: Weights
    write_tokenizer: TokenizerWriter | None
