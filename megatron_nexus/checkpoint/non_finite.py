"""Values that are not finite, NaN and infinity: how many of them the tensors hold that pass by."""

from collections import Counter

import numpy as np
import numpy.typing as npt

from megatron_nexus.errors import CheckpointError
from megatron_nexus.log import logger

SHOWN = 10


class NonFiniteValues:
    """Counts of values that are not finite, by the name of their tensor."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, tensor: str, values: npt.NDArray[np.float32]) -> None:
        """Count the values of a tensor that are not finite."""
        wrong = values.size - np.count_nonzero(np.isfinite(values))
        if wrong:
            self.counts[tensor] += int(wrong)

    def refuse(self, source: object, allowed: bool) -> None:
        """Raise CheckpointError where values of `source` were not finite; where that is `allowed`, warn."""
        if self.counts and not allowed:
            raise CheckpointError(
                f"{source} holds {self}: a model that computes nothing; take an earlier checkpoint or other "
                "files, or write it unchanged with --allow-nonfinite"
            )
        if self.counts:
            logger.warning("%s holds %s: written unchanged", source, self)

    def __str__(self) -> str:
        """List the first tensors that hold such values, with their counts."""
        listed = [f"{tensor}: {count:,}" for tensor, count in list(self.counts.items())[:SHOWN]]
        left_out = len(self.counts) - SHOWN
        more = [f"and {left_out} more tensors"] if left_out > 0 else []
        return f"values that are not finite (NaN, infinity) in {'; '.join([*listed, *more])}"
