"""What a micro-batch asks of an accelerator, by layer: from traces of the model with one block.

All blocks are alike, so that embedding, block and head make every pipeline stage of any depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.planner.kernels import Kernel
from megatron_nexus.planner.memory import stage_shape
from megatron_nexus.planner.trace import Span, trace


@dataclass(frozen=True)
class LayerWork:
    """The kernels of a layer, forward and backward, and the bytes that it keeps between the two."""

    kernels: tuple[Kernel, ...]
    kept_bytes: float

    def between(self, other: "LayerWork", share: float) -> "LayerWork":
        """Return the work of a micro-batch that is `share` of the way to a larger one: affine in its size."""
        kernels = (a.between(b, share) for a, b in zip(self.kernels, other.kernels, strict=True))
        return LayerWork(tuple(kernels), self.kept_bytes + share * (other.kept_bytes - self.kept_bytes))


@dataclass(frozen=True)
class Work:
    """A micro-batch's work: of the embedding, of one block, of the head with the loss."""

    embedding: LayerWork
    block: LayerWork
    head: LayerWork

    def of_layers(self, layers: range, blocks: int) -> list[tuple[int, LayerWork]]:
        """Return how often a stage of `layers` runs each, in a model of so many blocks."""
        first, last = layers[0] == 0, layers[-1] == blocks + 1
        return [(first, self.embedding), (len(layers) - first - last, self.block), (last, self.head)]

    def between(self, other: "Work", share: float) -> "Work":
        """Return the work of a micro-batch that is `share` of the way to a larger one, or beyond."""
        return Work(
            self.embedding.between(other.embedding, share),
            self.block.between(other.block, share),
            self.head.between(other.head, share),
        )


def traced_work(config: RunConfig) -> Work:
    """Return the work of a micro-batch on a rank."""
    whole = replace(config, model=replace(config.model, num_layers=1))
    traced = trace(stage_shape(whole, range(3), "cuda"))

    def work(forward: Sequence[Span], backward: Sequence[Span]) -> LayerWork:
        kernels = (kernel for span in (*forward, *backward) for kernel in span.kernels)
        kept = sum(event[1] for span in forward for event in span.events if not isinstance(event, str))
        return LayerWork(tuple(kernels), kept)

    forward, backward = traced.forward, traced.backward
    embedding, block, head = forward.layers
    # Backward begins with the loss, which follows the head.
    head_back, block_back, embedding_back = backward.layers
    return Work(
        work((forward.before, embedding), (embedding_back,)),
        work((block,), (block_back,)),
        work((head,), (backward.before, head_back)),
    )


def work_by_micro_batch(config: RunConfig) -> Callable[[int], Work]:
    """Return the work of micro-batches of any size, from the traces of 2 and 4 samples."""
    sizes = (replace(config.training, micro_batch_size=size) for size in (2, 4))
    two, four = (traced_work(replace(config, training=training)) for training in sizes)
    return lambda size: two.between(four, (size - 2) / 2)
