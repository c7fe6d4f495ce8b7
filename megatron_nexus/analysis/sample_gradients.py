"""Gradients of single samples of a trained model, at any topology, sketched as they are computed.

The loss of a sample is the mean over its answer's tokens of -log p. The model is the plain decoder, its
weights from a checkpoint of any topology and ZeRO stage, with no optimizer: a rank holds its part of the
weights, the codes of the sketch, and one parameter's gradient at a time. Pipeline stages hand each sample's
activations on and its gradient back, one sample at a time.

T tokens, D hidden, K numbers of a sketch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.analysis.sketch import Sketcher, make_bins
from megatron_nexus.checkpoint.store import StateReader
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.models.decoder import DecoderStage, Loss, decoder_specs, stage_layers
from megatron_nexus.models.layer_context import LayerContext, padding_multiple
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Shard

ADAM_SECOND_MOMENT = "exp_avg_sq"


class SampleGradients:
    """A loaded model that sketches the gradient of one sample after the other."""

    def __init__(
        self,
        reader: StateReader,
        config: RunConfig,
        mesh: Mesh | None,
        dtype: torch.dtype,
        sketch_size: int,
        seed: int,
        per_tensor: bool = False,
        by_adam: bool = False,
    ) -> None:
        """Load this rank's part of the weights.

        Args:
            reader: the checkpoint.
            config: of its run.
            mesh: the ranks; None: this process alone, on its CPU.
            dtype: of weights and activations. Sketches are float32 or more.
            sketch_size: K; 0: the gradients themselves.
            seed: of bins and signs.
            per_tensor: divide each tensor's gradient by its norm.
            by_adam: divide each element by sqrt(v) + eps of the checkpoint's Adam; those that never had a
                gradient, v = 0, are left out.

        Raises CheckpointError.
        """
        model = config.model
        self._mesh = mesh
        self.device = mesh.device if mesh is not None else torch.device("cpu")
        rank, size = (mesh.tp_rank, mesh.tp_size) if mesh is not None else (0, 1)
        shard = Shard(rank, size, padding_multiple(config, self.device.type))
        tp = TensorParallel(mesh.tp_group if mesh is not None else None)
        stages = stage_layers(model, config.training.seq_length, mesh.pp_size if mesh is not None else 1)
        context = LayerContext(tp, shard, None, dtype, recompute=config.training.recompute_granularity)
        layers = stages[mesh.pp_rank if mesh is not None else 0]
        self.stage = DecoderStage(model, layers, context).to(self.device)
        self._loss = Loss(model, tp, shard)
        self._dtype, self._hidden = dtype, model.hidden_size
        parameters = logical_parameters(self.stage)
        scales = {}
        for name, (spec, parameter) in parameters.items():
            _fill(reader, spec, "fp32", shard, parameter.data)
            if by_adam:
                scales[name] = _adam_scale(reader, spec, shard, parameter)
        bins = make_bins(decoder_specs(model), sketch_size, seed)
        self.sketch_size = bins.size
        self._sketcher = Sketcher(parameters, bins, shard, tp, scales, per_tensor)

    def sketch(
        self, samples: Sequence[AnswerTokens], advance: Callable[[int], None] = lambda _: None
    ) -> Tensor:
        """Return the sketch of each sample's gradient, [samples, K], on every rank; a collective call.

        Data-parallel ranks take the samples in turn; all ranks sum their parts in one all-reduce. `advance`
        is called with how many samples are done, of all ranks.
        """
        mesh = self._mesh
        dtype = torch.promote_types(self._dtype, torch.float32)
        sketches = torch.zeros(len(samples), self.sketch_size, dtype=dtype, device=self.device)
        step, first = (mesh.dp_size, mesh.dp_rank) if mesh is not None else (1, 0)
        for number in range(first, len(samples), step):
            self.backward(samples[number])
            sketches[number] = self._sketcher.take()
            advance(min(step, len(samples) - number + first))
        if mesh is not None and mesh.world_size > 1:
            dist.all_reduce(sketches)
        return sketches

    def backward(self, sample: AnswerTokens) -> None:
        """Compute a sample's gradients on this stage; a collective call of the ranks of one model."""
        mesh = self._mesh
        is_first, is_last = (mesh.is_first_stage, mesh.is_last_stage) if mesh is not None else (True, True)
        if is_first:
            x = torch.tensor([sample.tokens], device=self.device)
        else:
            x = torch.empty(len(sample.tokens), 1, self._hidden, dtype=self._dtype, device=self.device)
            self._receive(x, -1)
            x.requires_grad_()
        y = self.stage(x)
        assert isinstance(y, Tensor), "no positions were given"
        if is_last:
            first = sample.answer_start - 1
            labels_1T = torch.tensor([sample.labels[first:]], device=self.device)
            self._loss(y[first:], labels_1T).backward()
        else:
            self._send(y, 1)
            grad = torch.empty_like(y)
            self._receive(grad, 1)
            y.backward(grad)
        if not is_first:
            assert x.grad is not None, "the stage's input has a gradient"
            self._send(x.grad, -1)

    def _send(self, x: Tensor, stages: int) -> None:
        assert self._mesh is not None, "there are other stages"
        neighbour = self._mesh.pp_rank + stages
        dist.send(x.detach().contiguous(), group=self._mesh.pp_group, group_dst=neighbour)

    def _receive(self, x: Tensor, stages: int) -> None:
        assert self._mesh is not None, "there are other stages"
        dist.recv(x, group=self._mesh.pp_group, group_src=self._mesh.pp_rank + stages)


def _fill(reader: StateReader, spec: ParamSpec, state: str, shard: Shard, values: Tensor) -> None:
    """Read this rank's part of a tensor; padding stays zero."""
    box = shard.box(spec)
    if box.numel:
        read = torch.from_numpy(reader.read_box(spec.name, state, box))
        values[box.index_at_origin] = read.to(values.device, values.dtype)


def _adam_scale(reader: StateReader, spec: ParamSpec, shard: Shard, parameter: Tensor) -> Tensor:
    """Return 1 / (sqrt(v) + eps) of this rank's elements, 0 where v is 0."""
    v = torch.zeros(shard.local_shape(spec), dtype=torch.promote_types(parameter.dtype, torch.float32))
    _fill(reader, spec, ADAM_SECOND_MOMENT, shard, v)
    groups = reader.manifest.optimizer.groups.values()
    epsilon = max(float(str(group["eps"])) for group in groups if "eps" in group)  # all groups share it
    return torch.where(v > 0, 1.0 / (v.sqrt() + epsilon), 0.0).to(parameter.device)
