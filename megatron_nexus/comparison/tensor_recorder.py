"""Tensor recorder: hooks that write what one rank sees in a step, as parts of logical tensors.

Activations and their gradients are kept of a few samples, parameters, their gradients and optimizer state
whole. Layers are not changed: modules are hooked by their place, hidden units come from the layers' own
`ActivationObserver`. No collective is called, so that what is recorded is what runs.

T tokens, B batch, D hidden, W units of this rank. Under sequence parallelism T is this rank's part outside
`enter` ... `leave`, where x is split by tokens or the same on every rank; inside it is split by units.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_nexus.comparison.recording import Key, LogicalAxis, Phase, RecordingWriter
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.attention import Attention
from megatron_nexus.models.decoder import Block, Embedding, Head
from megatron_nexus.models.parameters import Linear
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import Axis, Layout, ParamSpec
from megatron_nexus.spec.shard import Box
from megatron_nexus.training.engine import Engine, StepResult
from megatron_nexus.training.rank_batches import Batch

SCALAR = (LogicalAxis("value", 1),)


def logical_axes(spec: ParamSpec) -> tuple[LogicalAxis, ...]:
    """Return the axes of a parameter."""
    return tuple(LogicalAxis(axis.name, axis.size, axis.group) for axis in spec.axes)


class TensorRecorder:
    """Records the steps of an engine on this rank."""

    def __init__(
        self, writer: RecordingWriter, config: RunConfig, mesh: Mesh, engine: Engine, samples: Sequence[int]
    ) -> None:
        """Hook the layers of `engine`; `samples` are those of a global batch whose activations are kept."""
        self._writer = writer
        self._config = config
        self._mesh = mesh
        self._engine = engine
        self._slots = {sample: slot for slot, sample in enumerate(samples)}
        self._step = 0
        self._micro = -1  # of the forward passes of this step, the last that has begun
        self._read = 0
        self._seen: set[tuple[str, int]] = set()
        self._gradients: dict[str, Tensor] = {}
        self._tokens_split = engine.stage.context.tp.sequence_parallel
        model = config.model
        self._heads = Axis("attention", model.attention_width, Layout.SHARDED, group=model.kv_channels)
        self._keys = replace(self._heads, name="keys", size=model.key_width)
        self._readers = {id(parameter): spec for spec, parameter in engine.parameters.values()}
        self._hook_layers()

    def _hook_layers(self) -> None:
        stage = self._engine.stage
        stage.register_forward_pre_hook(self._begin_micro_batch)
        stage.context.observer.callback = self._units
        for index, layer in zip(self._engine.layers, stage.layers, strict=True):
            if isinstance(layer, Embedding):
                self._after(layer, "embedding")
            elif isinstance(layer, Head):
                self._before(layer, "head.input")
                self._after(layer.norm, "final_norm")
                vocabulary = Axis("vocabulary", self._config.model.vocab_size, Layout.SHARDED_PADDED)
                self._after(layer, "head.logits", vocabulary)
            else:
                assert isinstance(layer, Block)
                self._hook_block(layer, f"layers.{index - 1}")
        for name, (spec, parameter) in self._engine.parameters.items():
            parameter.register_hook(lambda grad, name=name, spec=spec: self._gradient(name, spec, grad))

    def _hook_block(self, block: Block, name: str) -> None:
        self._before(block, f"{name}.input")
        attention, feed_forward = block.attention, block.feed_forward
        if not attention.post_norm:
            self._after(attention.norm, f"{name}.attention.norm")
            self._after(feed_forward.norm, f"{name}.feed_forward.norm")
        self._hook_heads(attention, f"{name}.attention")
        self._after(attention, f"{name}.attention")
        self._after(feed_forward, f"{name}.feed_forward")

    def _hook_heads(self, attention: Attention, name: str) -> None:
        def projected(module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
            for side, axis, x in zip("qkv", (self._heads, self._keys, self._keys), outputs, strict=True):
                self._activation(f"{name}.{side}", x, axis)

        def refined(module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
            for side, x in zip("qk", outputs, strict=True):
                units = x.flatten(2)
                is_keys = side == "k" and units.shape[2] == self._engine.shard.stored(self._keys)
                axis = self._keys if is_keys else self._heads
                self._activation(f"{name}.{side}_refined", units, axis)

        attention.qkv.register_forward_hook(projected)
        for side, axis in (("q", self._heads), ("k", self._keys)):
            norm = attention.q_norm if side == "q" else attention.k_norm
            if norm is not None:
                self._after(norm, f"{name}.{side}_norm", axis)
        if attention.refine is not None:
            attention.refine.register_forward_hook(refined)

        def mixed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            whole = not isinstance(attention.output, Linear)  # reads the heads of all ranks
            axis = replace(self._heads, layout=Layout.REPLICATED) if whole else self._heads
            # Of the gradient of all heads each rank has a share, which no layout says.
            self._activation(f"{name}.heads", inputs[0], axis, gradient=not whole)

        attention.output.register_forward_pre_hook(mixed)

    def _after(self, module: nn.Module, name: str, axis: Axis | None = None) -> None:
        def seen(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._activation(name, output.flatten(2) if output.dim() > 3 else output, axis)

        module.register_forward_hook(seen)

    def _before(self, module: nn.Module, name: str) -> None:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._activation(name, inputs[0], None)

        module.register_forward_pre_hook(seen)

    def _units(self, reader: Tensor, before: Tensor, after: Tensor) -> None:
        """Record the hidden units that a matrix reads, by its name."""
        spec = self._readers.get(id(reader))
        if spec is not None:
            axis = replace(spec.axes[1], layout=Layout.SHARDED_PADDED)
            self._activation(f"{spec.name}.input", after, axis)

    def _begin_micro_batch(self, stage: nn.Module, inputs: object) -> None:
        if torch.is_grad_enabled():
            self._micro += 1

    def _activation(self, name: str, x: Tensor, axis: Axis | None, gradient: bool = True) -> None:
        """Record x [T, B, D or W], of the micro-batch that runs, and its gradient when it comes.

        Only at first: activations that are computed again for the backward pass have no gradient.
        """
        micro = self._micro
        if not torch.is_grad_enabled() or (name, micro) in self._seen:
            return
        self._seen.add((name, micro))
        self._write_samples(Key(self._step, Phase.FORWARD, name), x, axis, micro)
        if x.requires_grad and gradient:
            key = Key(self._step, Phase.BACKWARD, name)
            # Of the mean loss of this rank's samples, hence a share of the mean of all.
            x.register_hook(lambda grad: self._write_samples(key, grad / self._mesh.dp_size, axis, micro))

    def _write_samples(self, key: Key, x: Tensor, axis: Axis | None, micro: int) -> None:
        self._writer.reserve(key)
        tokens = x.shape[0] * (self._mesh.tp_size if axis is None and self._tokens_split else 1)
        first_token = self._mesh.tp_rank * x.shape[0] if tokens > x.shape[0] else 0
        if axis is None:
            axis, (start, stop) = Axis("hidden", x.shape[-1]), (0, x.shape[-1])
        else:
            start, stop = self._engine.shard.logical_range(axis)
        axes = (
            LogicalAxis("sample", len(self._slots)),
            LogicalAxis("token", tokens),
            LogicalAxis(axis.name, axis.size, axis.group),
        )
        for slot, row in self._rows(micro):
            box = Box((slot, first_token, start), (1, x.shape[0], stop - start))
            self._writer.write(key, axes, box, x[:, row, : stop - start])

    def _rows(self, micro: int) -> Iterator[tuple[int, int]]:
        """Yield the samples of a micro-batch that are kept: their place among those, and in the batch."""
        size = self._config.training.micro_batch_size
        first = (micro * self._mesh.dp_size + self._mesh.dp_rank) * size
        for row in range(size):
            if first + row in self._slots:
                yield self._slots[first + row], row

    def _gradient(self, name: str, spec: ParamSpec, grad: Tensor) -> None:
        """Add the gradient of a micro-batch; not one of a partition."""
        if grad.shape != self._engine.shard.local_shape(spec):
            return
        self._writer.reserve(Key(self._step, Phase.BACKWARD, f"{name}.grad"))
        share = grad.detach() / self._mesh.dp_size
        self._gradients[name] = self._gradients[name] + share if name in self._gradients else share

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches, and record their tokens and labels."""
        for batch in batches:
            stream, labels_BT = batch
            assert isinstance(labels_BT, Tensor), "of the verb train"
            tokens_BT = stream[0] if isinstance(stream, tuple) else stream
            for name, ids_BT in (("tokens", tokens_BT), ("labels", labels_BT)):
                axes = (LogicalAxis("sample", len(self._slots)), LogicalAxis("token", ids_BT.shape[1]))
                for slot, row in self._rows(self._read):
                    box = Box((slot, 0), (1, ids_BT.shape[1]))
                    self._writer.write(Key(self._step, Phase.DATA, name), axes, box, ids_BT[row])
            self._read += 1
            yield batch

    def begin_step(self, step: int) -> None:
        """Record the weights that a step begins with."""
        self._step, self._micro, self._read = step, -1, 0
        self._seen.clear()
        shard, partitioned = self._engine.shard, set()
        for name, (spec, parameter) in self._engine.parameters.items():
            if parameter.shape != shard.local_shape(spec):  # ZeRO 3
                partitioned.add(name)
                continue
            box = shard.box(spec)
            held = parameter.detach()[box.index_at_origin]
            self._writer.write(Key(step, Phase.WEIGHTS, name), logical_axes(spec), box, held)
        for view in self._engine.state.views():
            if view.spec.name in partitioned:
                key = Key(step, Phase.WEIGHTS, view.spec.name)
                self._writer.write(key, logical_axes(view.spec), view.box, view.values["fp32"])

    def end_step(self, result: StepResult) -> None:
        """Record what a step ended with: loss, gradients and their norm, optimizer state."""
        box = Box((0,), (1,))
        shard = self._engine.shard
        for phase, name, value in (
            (Phase.LOSS, "loss", result.loss),
            (Phase.NORM, "gradient norm", result.grad_norm),
        ):
            values = torch.tensor([value], dtype=torch.float64)
            self._writer.write(Key(self._step, phase, name), SCALAR, box, values)
        for name, total in self._gradients.items():
            spec, _ = self._engine.parameters[name]
            held = total[shard.box(spec).index_at_origin]
            key = Key(self._step, Phase.BACKWARD, f"{name}.grad")
            self._writer.write(key, logical_axes(spec), shard.box(spec), held, is_share=True)
        self._gradients.clear()
        for view in self._engine.state.views():
            for state in ("exp_avg", "exp_avg_sq", "fp32"):
                key = Key(self._step, Phase.OPTIMIZER, f"{view.spec.name}.{state}")
                self._writer.write(key, logical_axes(view.spec), view.box, view.values[state])
