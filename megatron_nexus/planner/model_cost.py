"""What a model costs, and what the paper prints of it: parameters by part, FLOPs per token, bytes per rank.

Everything follows from the specs: the same numbers cut pipeline stages, appear in `--dry-run` and give
the log its MFU.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_nexus.config.command_line import model_name
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.paper import PRINTED_FLOPS_PER_TOKEN, nominal_parameters
from megatron_nexus.config.presets import PAPER_SIZES
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import layer_flops_per_token, layer_parts, training_flops_per_token
from megatron_nexus.planner.memory import memory_table, plan_state
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.spec.param import Role

# Kept out of the count of non-embedding parameters: the two matrices of the vocabulary.
VOCABULARY_PARTS = ("embedding", "head")
# Vectors that are not gains of norms.
GATES = ("q_gate", "k_gate")


@dataclass(frozen=True)
class ModelCost:
    """True parameters and FLOPs per token of a model, and the paper's numbers where it prints any."""

    name: str
    parts: Mapping[str, int]
    """Parameters by part; the gains of all norms are one part."""
    seq_length: int
    forward_flops: int
    attention_flops: int
    """Forward, of scores and weighted values: what of `forward_flops` grows with `seq_length`."""
    training_flops: int
    paper_size: str | None = None
    paper_parameters: int | None = None
    paper_flops: int | None = None

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def non_embedding(self) -> int:
        """Without the embedding and the head."""
        return sum(count for part, count in self.parts.items() if part not in VOCABULARY_PARTS)

    def as_json(self) -> dict[str, object]:
        """Return all numbers; deviations in percent of the paper's numbers."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding,
            "parameters_by_part": dict(self.parts),
            "seq_length": self.seq_length,
            "flops_per_token": {
                "forward": self.forward_flops,
                "forward_attention": self.attention_flops,
                "forward_and_backward": self.training_flops,
            },
            "paper": {
                "parameters": self.paper_parameters,
                "parameters_deviation": deviation(self.parameters, self.paper_parameters),
                "flops_per_token": self.paper_flops,
                "flops_deviation": deviation(self.forward_flops, self.paper_flops),
            },
        }


def deviation(true: int, printed: int | None) -> float | None:
    """Return how far the true number is from the printed one, in percent of it."""
    return 100.0 * (true - printed) / printed if printed else None


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Count parameters in embedding, q, k, v, gates, output, feed_forward, head, norms, over all layers."""
    counts: Counter[str] = Counter()
    norms = 0
    for layer in layer_parts(model):
        for part, specs in layer.items():
            vectors = parameter_count(spec for spec in specs if spec.role is Role.VECTOR)
            gains = 0 if part in GATES else vectors
            norms += gains
            counts[part] += parameter_count(specs) - gains
    return {part: count for part, count in [*counts.items(), ("norms", norms)] if count}


def model_cost(config: RunConfig, paper_name: str = "") -> ModelCost:
    """Return the cost of a run's model, with the paper's numbers for `paper_name` or its own preset."""
    model, length = config.model, config.training.seq_length
    name = model_name(config)
    forward = sum(layer_flops_per_token(model, length))
    return ModelCost(
        name=name,
        parts=parameters_by_part(model),
        seq_length=length,
        forward_flops=forward,
        attention_flops=forward - sum(layer_flops_per_token(model, 0)),
        training_flops=training_flops_per_token(model, length),
        paper_size=PAPER_SIZES.get(paper_name or name),
        paper_parameters=nominal_parameters(paper_name or name),
        paper_flops=None if paper_name else PRINTED_FLOPS_PER_TOKEN.get(name),
    )


def size_line(cost: ModelCost) -> str:
    """Format the true count and the paper's name for it."""
    line = f"{cost.name}: {cost.parameters:,} parameters"
    if cost.paper_size is None:
        return line
    off = deviation(cost.parameters, cost.paper_parameters)
    return f"{line}; the paper calls it {cost.paper_size} ({off:+.1f} %)"


def flops_line(cost: ModelCost) -> str:
    """Format FLOPs per token and the attention's part of them."""
    return (
        f"FLOPs per token: {cost.forward_flops:,} forward, of which {cost.attention_flops:,} attention over "
        f"{cost.seq_length:,} tokens; {cost.training_flops:,} forward and backward"
    )


def state_per_rank(config: RunConfig, world_size: int) -> list[Mapping[str, int]]:
    """Return bytes of weights, gradients and optimizer on a rank of each stage, and of all three."""
    plan = plan_state(config, world_size, "cuda" if torch.cuda.is_available() else "cpu")
    return [{**memory, "together": sum(memory.values())} for memory in plan]


def cost_lines(cost: ModelCost, config: RunConfig, world_size: int) -> list[str]:
    """Return the report of one model."""
    lines = [
        size_line(cost),
        f"{cost.non_embedding:,} without the embedding and the head",
        *(
            f"{part:>15}{count:>15,}{100 * count / cost.parameters:>7.1f} %"
            for part, count in cost.parts.items()
        ),
        flops_line(cost),
    ]
    if cost.paper_flops is not None:
        off = deviation(cost.forward_flops, cost.paper_flops)
        lines.append(f"the paper prints {cost.paper_flops:,} FLOPs per token (forward: {off:+.1f} %)")
    mesh = config.parallel
    return [
        *lines,
        f"memory per rank in MiB, {config.training.precision}, tensor {mesh.tensor_model_parallel_size} x "
        f"pipeline {mesh.pipeline_model_parallel_size} x data {config.data_parallel_size(world_size)}, "
        f"ZeRO {max(1, mesh.zero_stage)}, without activations and buffers, which --dry-run of a run adds",
        *memory_table(state_per_rank(config, world_size), world_size),
    ]
