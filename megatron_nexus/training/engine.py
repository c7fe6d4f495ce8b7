"""Engine: one face for DeepSpeed's two engines. One of the files sealed for `deepspeed`.

Pipeline stages > 1: DeepSpeed's PipelineEngine, ZeRO 1. One stage: the plain engine, ZeRO 1, 2, 3. Both
train the same modules under the same logical names.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from megatron_nexus.config.deepspeed_config import bucket_elements, deepspeed_config, engine_reduces_gradients
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError
from megatron_nexus.log import logger
from megatron_nexus.models.activation_observer import Seen
from megatron_nexus.models.decoder import DecoderStage, Loss, stage_layers
from megatron_nexus.models.eager import eager
from megatron_nexus.models.layer_context import padding_multiple
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.grid import Grid
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.float64_engine import float64_engine, reduce_in_float64
from megatron_nexus.training.gradient_reducer import reduce_gradients
from megatron_nexus.training.linear_cross_entropy import LinearCrossEntropy
from megatron_nexus.training.optimizer import make_optimizer
from megatron_nexus.training.pipeline_phases import mark_pipeline_phases
from megatron_nexus.training.rank_batches import Batch, map_batch
from megatron_nexus.training.stage_module import Output, layer_context, stage_module, training_loss
from megatron_nexus.training.update_gate import Admits, UpdateGate
from megatron_nexus.training.zero_state import ZeroState, zero_state


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports, the same on every rank: nats per token, global gradient norm."""

    loss: float
    grad_norm: float
    flags: tuple[bool, ...] = ()
    """Which of the flags given to the step are set on any rank."""
    was_made: bool = True
    """Whether the weights were updated: not where `admits` said no, or gradients are not finite."""


@contextlib.contextmanager
def _deepspeed_errors_as_config_errors(file: str) -> Iterator[None]:
    """Raise ConfigError for what DeepSpeed rejects in the user's own file."""
    try:
        yield
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise ConfigError(
            [f"--deepspeed-config {file}: {error.title}: {one}: correct it, or drop it" for one in wrong]
        ) from error


class Engine:
    """The model of a run, its optimizer state and its steps."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        init_weights: bool = True,
        beacon: Beacon | None = None,
        float64: bool = False,
    ) -> None:
        """Build the stage of this rank and hand it to DeepSpeed; a collective call.

        With `init_weights=False` weights are zero, for a checkpoint to fill: drawing 7B takes two minutes.
        `beacon` shows where in a step this rank is. `float64` has weights, gradients and moments in float64,
        whatever the precision of the run.
        """
        # On a CPU DeepSpeed would build a shared-memory collective that leaves 67 MB per rank in /dev/shm.
        # vars(): the attribute, read for the first time, imports setuptools and tries what can be compiled.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._mesh = mesh
        self._beacon = beacon or Beacon()
        self.shard = Shard(mesh.tp_rank, mesh.tp_size, padding_multiple(config, mesh.device.type))
        engine_config = deepspeed_config(config, mesh.world_size, mesh.device.type)
        stages = stage_layers(config.model, config.training.seq_length, mesh.pp_size)
        self.layers = stages[mesh.pp_rank]
        context = layer_context(config, mesh, self.shard, init_weights, float64)
        #: The loss of logits, which knows this rank's part of the vocabulary.
        self.logits_loss = Loss(config.model, context.tp, self.shard, config.training.compile)
        self._loss = training_loss(config, mesh, context, self.logits_loss)
        grid = Grid(mesh)
        # DeepSpeed prints its topology and layers; our log says what a user needs of it.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_init_required=False, verbose=False)
            model = stage_module(config, mesh, stages, context, self._loss, grid, engine_config)
            #: Every parameter of this stage with its spec, by logical name.
            self.parameters: dict[str, tuple[ParamSpec, nn.Parameter]] = logical_parameters(model)
            buckets = bucket_elements(config, mesh.world_size, engine_config)
            with (
                _deepspeed_errors_as_config_errors(config.parallel.deepspeed_config),
                float64_engine() if float64 else contextlib.nullcontext(),
            ):
                #: `optimizer` is DeepSpeed's: it keeps master weights and gradients, and steps ours.
                self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                    model=model,
                    optimizer=make_optimizer(self.parameters, config.optimizer, mesh.device, buckets),
                    config=engine_config,
                    mpu=grid if mesh.pp_size == 1 else None,  # a PipelineModule has its own
                )
        if float64:
            reduce_in_float64(self.deepspeed, mesh)
        if engine_reduces_gradients(engine_config):
            reduce_gradients(self.deepspeed, mesh, config.parallel.overlap_grad_reduce, self._beacon)
        elif mesh.dp_size > 1 and config.parallel.zero_stage < 2:
            logger.info(
                "DeepSpeed reduces the gradients, after the backward pass: "
                f"{config.parallel.deepspeed_config} sets up its own reduction"
            )
        if mesh.pp_size > 1:
            mark_pipeline_phases(self.deepspeed, self._beacon)
        model.register_forward_pre_hook(self._mark_evaluation)

    @cached_property
    def state(self) -> ZeroState:
        """Return what a checkpoint holds of this rank."""
        return zero_state(self.deepspeed, self.parameters, self.shard)

    def write_monitors(self, values: Mapping[str, float]) -> None:
        """Hand numbers to the monitors of --deepspeed-config, whose axis is the samples that were read."""
        samples = self.deepspeed.global_samples
        self.deepspeed.monitor.write_events([(tag, value, samples) for tag, value in values.items()])

    def set_batch_size(self, samples: int) -> None:
        """Have each step from now on take `samples` over all ranks: more, or fewer, micro-batches of each."""
        if samples != self.deepspeed.train_batch_size():
            self.deepspeed.set_train_batch_size(samples)
            # A step ends where micro_steps is a multiple of their number in a step.
            per_step = self.deepspeed.gradient_accumulation_steps()
            self.deepspeed.micro_steps = self.deepspeed.global_steps * per_step

    def train_step(
        self,
        batches: Iterator[Batch],
        learning_rate: float,
        flags: Callable[[], Sequence[bool]] = tuple,
        admits: Admits | None = None,
    ) -> StepResult:
        """Take one optimizer step over the next micro-batches.

        The ranks agree on `flags`, asked for at the end of the step, in the reduction of the loss. A step
        whose gradients are not finite leaves the weights as they were, and its norm is not finite. So does
        one that `admits` refuses, which is asked once the norm is known; a pipeline then has no loss yet.
        """
        if admits is not None:
            self._gate.begin(admits)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._mesh.pp_size > 1:
            loss = self.deepspeed.train_batch(data_iter=self._on_device(batches)).item()
            self._beacon.mark(Phase.LOSS)
            _, agreed = self._reduce(torch.zeros((), device=self._mesh.device), flags())
        else:
            self.deepspeed.train()
            losses = []
            for _ in range(self.deepspeed.gradient_accumulation_steps()):
                batch = self._next(batches)
                loss_tensor = self.deepspeed(*batch)
                losses.append(loss_tensor.detach())
                self._beacon.mark(Phase.BACKWARD)
                self.deepspeed.backward(loss_tensor)
                if admits is not None and len(losses) == self.deepspeed.gradient_accumulation_steps():
                    self._gate.loss = self._reduce(torch.stack(losses).mean())[0]
                self._beacon.mark(Phase.OPTIMIZER)
                self.deepspeed.step()
            self._beacon.mark(Phase.LOSS)
            loss, agreed = self._reduce(torch.stack(losses).mean(), flags())
        norm = float("inf") if self.optimizer.overflow else float(self.deepspeed.get_global_grad_norm())
        return StepResult(loss, norm, agreed, admits is None or self._gate.was_made)

    @cached_property
    def _gate(self) -> UpdateGate:
        """What asks whether an update is to be made; not there until a step is given something to ask."""
        return UpdateGate(self.deepspeed)

    def _mark_evaluation(self, model: nn.Module, _: object) -> None:
        """Have each micro-batch of an evaluation count as progress, on every pipeline stage."""
        if not model.training:
            self._beacon.mark(Phase.EVALUATION)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], count: int) -> float:
        """Return mean loss in nats per token over `count` micro-batches of each rank."""
        if self._mesh.pp_size > 1:
            loss = self.deepspeed.eval_batch(map(self._to_device, batches), num_micro_batches=count)
            return float(loss.item())
        self.deepspeed.eval()
        losses = [self.deepspeed(*self._to_device(next(batches))) for _ in range(count)]
        return self._reduce(torch.stack(losses).mean())[0]

    @eager  # observers read values
    def observe_activations(self, batches: Iterator[Batch], count: int, seen: Seen) -> None:
        """Run `count` micro-batches of each rank forward, and have `seen` called with each activation."""
        observer = self.stage.context.observer
        observer.callback = seen
        try:
            self.evaluate(batches, count)
        finally:
            observer.callback = None

    @torch.no_grad()
    @eager  # texts have many lengths
    def outputs(self, batches: Sequence[Batch], output: Output) -> list[Tensor]:
        """Return what `output` makes of each micro-batch.

        A collective call with as many batches of one shape on every rank; other stages than the last get [].
        """
        if isinstance(self._loss, LinearCrossEntropy):
            output = self._loss.of_logits(output)
        if self._mesh.pp_size == 1:
            self.deepspeed.eval()
            return [self.deepspeed(*self._to_device(batch), output=output) for batch in batches]
        module = self.deepspeed.module
        self._reset_pipe_buffers()
        module.loss_fn = output
        try:
            found: list[Tensor] | None = self.deepspeed.eval_batch(
                map(self._to_device, batches),
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(batches),
            )
        finally:
            module.loss_fn = self._loss
            self._reset_pipe_buffers()
        return found or []

    def _reset_pipe_buffers(self) -> None:
        """Reallocate the pipeline's buffers and reset its loss sum, for batches of another shape."""
        self.deepspeed.reset_activation_shape()
        self.deepspeed.total_loss = None

    @eager  # hooks read values
    def diagnose(self, batches: Iterator[Batch]) -> str:
        """Repeat a failed step and return what is first not finite on this rank, "" if nothing is."""
        found: list[str] = []

        def look(what: str, value: Tensor) -> None:
            if not bool(torch.isfinite(value).all()):
                found.append(what)

        for index, layer in zip(self.layers, self.stage.layers, strict=True):
            layer.register_forward_hook(
                lambda module, inputs, output, index=index: look(f"the output of layer {index}", output)
            )
        for name, (_, parameter) in self.parameters.items():
            parameter.register_hook(lambda grad, name=name: look(f"the gradient of {name}", grad))
        self.train_step(batches, learning_rate=0.0)
        return found[0] if found else ""

    @property
    def stage(self) -> DecoderStage:
        """The layers of this rank."""
        module = self.deepspeed.module
        stage = module.forward_funcs[0] if self._mesh.pp_size > 1 else module.stage
        assert isinstance(stage, DecoderStage)
        return stage

    def _reduce(self, loss: Tensor, flags: Sequence[bool] = ()) -> tuple[float, tuple[bool, ...]]:
        """Return the mean loss of the data-parallel ranks, and which flags are set on any rank at all."""
        mesh = self._mesh
        dtype = torch.promote_types(loss.dtype, torch.float32)
        summed = torch.empty(1 + len(flags), device=loss.device, dtype=dtype)
        summed[0] = loss.detach()
        for index, flag in enumerate(flags, start=1):
            summed[index].fill_(float(flag))  # a copy from the host would wait for the GPU
        dist.all_reduce(summed, group=mesh.dp_group)
        if flags and mesh.model_group.size() > 1:
            dist.all_reduce(summed[1:], group=mesh.model_group)
        total, *counts = summed.tolist()
        return total / mesh.dp_size, tuple(count > 0 for count in counts)

    def _to_device(self, batch: Batch) -> Batch:
        """Return a batch on the device; from pinned memory, as a copy from any other waits for the GPU."""
        if self._mesh.device.type != "cuda":
            return batch
        return map_batch(batch, lambda x: x.pin_memory().to(self._mesh.device, non_blocking=True))

    def _next(self, batches: Iterator[Batch]) -> Batch:
        self._beacon.mark(Phase.DATA)
        batch = self._to_device(next(batches))
        self._beacon.mark(Phase.FORWARD)
        return batch

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            yield self._next(batches)
