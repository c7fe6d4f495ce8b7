"""The arrangements of ranks under which the toy of test_checkpoint_engines.py runs. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """An arrangement of ranks with a precision and a ZeRO stage."""

    zero_stage: int
    precision: str = "fp32"
    tensor_size: int = 1
    pipe_size: int = 1

    @property
    def name(self) -> str:
        return f"zero{self.zero_stage}-{self.precision}-tp{self.tensor_size}-pp{self.pipe_size}"


TWO_RANKS = [
    Kind(1),
    Kind(2),
    Kind(3),
    Kind(1, "bf16"),  # BF16_Optimizer
    Kind(1, "bf16_accumulating_bf16"),  # DeepSpeedZeroOptimizer with a master copy
    Kind(2, "bf16"),
    Kind(3, "bf16"),
    Kind(1, tensor_size=2),
    Kind(3, tensor_size=2),
    Kind(1, pipe_size=2),
    Kind(1, "bf16", pipe_size=2),
]
TWO_RANK_CROSSINGS = [
    (Kind(3), Kind(1, tensor_size=2)),
    (Kind(1, tensor_size=2), Kind(2)),
    (Kind(3, tensor_size=2), Kind(1, "bf16", pipe_size=2)),
    (Kind(1, "bf16", pipe_size=2), Kind(3, "bf16")),
    (Kind(1, "bf16"), Kind(3, tensor_size=2)),
    (Kind(1), Kind(3)),
    (Kind(2, "bf16"), Kind(1, pipe_size=2)),
    (Kind(3, "bf16"), Kind(1, "bf16_accumulating_bf16")),
]
FOUR_RANKS = [
    Kind(3, tensor_size=2),
    Kind(1, "bf16", tensor_size=2),
    Kind(1, "bf16", pipe_size=2, tensor_size=2),
]
FOUR_RANK_CROSSINGS = [
    (Kind(3, tensor_size=2), Kind(1, "bf16", pipe_size=2)),
    (Kind(1, "bf16", pipe_size=2, tensor_size=2), Kind(3)),
    (Kind(1, "bf16", tensor_size=2), Kind(2)),
    (Kind(1, "bf16", pipe_size=2, tensor_size=2), Kind(1, tensor_size=2)),
]
STARTS = {2: (TWO_RANKS, TWO_RANK_CROSSINGS), 4: (FOUR_RANKS, FOUR_RANK_CROSSINGS)}
KILLED = Kind(1)


def at_step(folder: Path, step: int) -> Path:
    return folder / f"iter_{step:07d}"
