"""A model of others, as the importer sees it: what it is, and its weights, some rows at a time."""

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class SourceModel:
    """A model in files of others.

    `config` is Hugging Face's `config.json`, or its equivalent. `write_tokenizer` writes the tokenizer into a
    folder, as `open_tokenizer` finds it there (raises DataError, OSError); None where there is none.
    """

    name: str
    format: str
    config: JsonObject
    weights: Weights
    write_tokenizer: Callable[[Path], None] | None
