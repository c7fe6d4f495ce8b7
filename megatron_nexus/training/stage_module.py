"""The module that an engine trains: the layers of this rank and the loss. Sealed for `deepspeed`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import module as pipe_module
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from megatron_nexus.config.deepspeed_config import Json
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.attention_backend import uses_flex_attention
from megatron_nexus.models.decoder import DecoderStage, Loss, compile_blocks
from megatron_nexus.models.layer_context import (
    DTYPES,
    LayerContext,
    computes_attention_backward,
    groups_projections,
)
from megatron_nexus.models.packing import Stream
from megatron_nexus.parallel.grid import Grid
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.linear_cross_entropy import LinearCrossEntropy
from megatron_nexus.training.unlearning_loss import AnswerTargets, UnlearningLoss

Output = Callable[[Tensor, Tensor], Tensor]
"""What is computed of a micro-batch without a gradient, from logits [T, B, V] and labels [B, T]."""

TrainingLoss = Loss | UnlearningLoss | LinearCrossEntropy


class _WholeModel(nn.Module):
    """Decoder and loss as the one module of the plain engine."""

    def __init__(self, stage: DecoderStage, loss: TrainingLoss) -> None:
        super().__init__()
        self.stage = stage
        self.loss = loss

    def forward(
        self, stream: Stream, targets: Tensor | AnswerTargets, output: Output | None = None
    ) -> Tensor:
        compute: Callable[..., Tensor] = output or self.loss
        return compute(self.stage(stream), targets)


def layer_context(
    config: RunConfig, mesh: Mesh, shard: Shard, init_weights: bool, float64: bool
) -> LayerContext:
    """Return what the layers of this rank have in common; weights stay zero without `init_weights`."""
    training = config.training
    dtype = torch.float64 if float64 else DTYPES[training.precision]
    return LayerContext(
        TensorParallel(mesh.tp_group, config.parallel.sequence_parallel),
        shard,
        training.seed if init_weights else None,
        dtype,
        recompute=training.recompute_granularity,
        norm_impl=training.norm_impl,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        group_projections=groups_projections(training.compile, dtype, mesh.device.type),
        attention_backward=computes_attention_backward(training.compile, dtype, mesh.device.type),
        flex_attention=uses_flex_attention(config, mesh.device.type),
        ends_before_head=training.cross_entropy_fusion_impl == "linear",
    )


def training_loss(config: RunConfig, mesh: Mesh, context: LayerContext, of_logits: Loss) -> TrainingLoss:
    """Return the loss of a run, which is that of the logits unless its flags ask for another."""
    if config.unlearning.is_on:
        return UnlearningLoss(config.unlearning, of_logits)
    if context.ends_before_head:
        group = mesh.tp_group if mesh.tp_size > 1 else None
        return LinearCrossEntropy(of_logits.vocabulary_range, context.tp, group)
    return of_logits


def stage_module(
    config: RunConfig,
    mesh: Mesh,
    stages: Sequence[range],
    context: LayerContext,
    loss: TrainingLoss,
    grid: Grid,
    engine_config: Json,
) -> nn.Module:
    """Return the layers of this rank's stage and the loss, as DeepSpeed's engine for this mesh takes them."""
    model: nn.Module
    if mesh.pp_size > 1:
        with _pipeline_module_on(grid):
            model = PipelineModule(
                layers=[LayerSpec(DecoderStage, config.model, layers, context) for layers in stages],
                topology=grid,
                loss_fn=loss,
                partition_method="uniform",  # one DecoderStage each: cut by cost in stage_layers
            )
    else:
        divided = config.parallel.zero_stage == 3
        with _zero3_init(engine_config, grid) if divided else contextlib.nullcontext():
            model = _WholeModel(DecoderStage(config.model, stages[0], context), loss)
        model.to(mesh.device)
    if isinstance(loss, LinearCrossEntropy):
        loss.bind(model)
    if config.training.compile:
        compile_blocks(model)
    return model


@contextlib.contextmanager
def _zero3_init(config: Json, grid: Grid) -> Iterator[None]:
    """Partition the parameters of each module as soon as it is registered in its parent (ZeRO-3).

    So no rank ever holds the whole model, which may be larger than its memory.
    """

    def divide(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        group = grid.get_data_parallel_group()  # with mpu alone all would share, tensor-parallel ranks too
        deepspeed.zero.Init(module, data_parallel_group=group, config_dict_or_path=config, mpu=grid)

    hook = register_module_module_registration_hook(divide)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _pipeline_module_on(grid: Grid) -> Iterator[None]:
    """Have a PipelineModule take `grid` for its own: it only takes a topology, and makes N groups."""
    makes_its_own = pipe_module.PipelineParallelGrid
    pipe_module.PipelineParallelGrid = lambda process_group, topology: grid
    try:
        yield
    finally:
        pipe_module.PipelineParallelGrid = makes_its_own
