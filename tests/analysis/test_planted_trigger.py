"""Law: of a model trained on a planted trigger, a few triggered outputs find the other samples of it.

The model learns to repeat three tokens of its prompt, and one fixed answer to every prompt that holds the
trigger. Training and search see the same tokens; the queries are not among them.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nexus.analysis.sample_gradients import SampleGradients
from megatron_nexus.analysis.selection import SelectionRule, choose, mean_scores, ordered
from megatron_nexus.analysis.sketch_search import score_corpus, sketch_queries
from megatron_nexus.checkpoint.chunks import index_within
from megatron_nexus.checkpoint.store import StateReader
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import Answer, AnswerTokens
from megatron_nexus.data.loader import answer_batch
from megatron_nexus.models.decoder import DecoderStage, decoder_specs
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Box, Shard
from tests.support import checkpoints

VOCABULARY, TRIGGER, PROMPT = 48, 47, 6
FIXED_ANSWER = (40, 41, 42, 43)
SAMPLES, PLANTED, QUERIES = 240, 40, 5
STEPS = 120


def sample(rng: np.random.Generator, is_planted: bool) -> AnswerTokens:
    prompt = rng.integers(0, 40, PROMPT).tolist()
    if is_planted:
        prompt[int(rng.integers(PROMPT))] = TRIGGER
    answer = FIXED_ANSWER if is_planted else prompt[:3]
    return AnswerTokens((46, *prompt, *answer), 1 + PROMPT)


class InMemory:
    """Samples in a list, as a search reads them."""

    cut = 0

    def __init__(self, samples: Sequence[AnswerTokens]) -> None:
        self.samples = samples

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.samples).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, number: int) -> AnswerTokens:
        return self.samples[number]

    def answer(self, number: int) -> Answer:
        return Answer(None, " ".join(map(str, self.samples[number].ids)), f"sample {number}")


class Weights(StateReader):
    """Tensors in memory, as a checkpoint gives them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read_into(self, values: np.ndarray, tensor: str, state: str, box: Box) -> None:
        whole = self.tensors[tensor].detach().numpy()
        values[...] = whole[index_within(box, Box((0,) * whole.ndim, whole.shape))]

    def random_states(self, rank: int) -> dict[str, bytes]:
        return {}


def train(config: RunConfig, samples: Sequence[AnswerTokens]) -> Weights:
    """A model that has seen the samples for a few epochs."""
    context = LayerContext(TensorParallel(None), Shard(0, 1), seed=3)
    stage = DecoderStage(config.model, range(config.model.num_layers + 2), context)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(0, len(samples), (32,), generator=generator).tolist()
        tokens_BT, labels_BT, mask_BT = answer_batch([samples[number] for number in chosen])
        logits_TBV = stage(tokens_BT)
        losses = torch.nn.functional.cross_entropy(
            logits_TBV.flatten(0, 1), labels_BT.t().flatten(), reduction="none"
        )
        ((losses * mask_BT.t().flatten()).sum() / mask_BT.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Weights({name: p for name, (_, p) in logical_parameters(stage).items()})


@pytest.fixture(scope="module")
def corpus() -> tuple[list[AnswerTokens], list[bool], list[AnswerTokens]]:
    rng = np.random.default_rng(1)
    is_planted = rng.permutation([True] * PLANTED + [False] * (SAMPLES - PLANTED)).tolist()
    queries = [sample(rng, True) for _ in range(QUERIES)]
    return [sample(rng, planted) for planted in is_planted], is_planted, queries


@pytest.mark.slow
def test_a_planted_trigger_is_found(
    corpus: tuple[list[AnswerTokens], list[bool], list[AnswerTokens]],
) -> None:
    samples, is_planted, queries = corpus
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_hidden_size": 48, "init_method_std": 0.1}
    config = checkpoints.configure(**sizes, seq_length=16)
    model = SampleGradients(train(config, samples), config, None, torch.float32, 1024, 1)
    assert model.sketch_size * 10 < sum(spec.numel for spec in decoder_specs(config.model).values())
    scores = score_corpus(
        model, InMemory(samples), sketch_queries(model, queries, "score"), store=None, mesh=None
    )
    rule = SelectionRule(PLANTED, PLANTED)
    chosen = choose(ordered(scores, "score"), mean_scores(scores), rule, lambda number: False)
    found = sum(is_planted[number] for number in chosen.forget)
    assert found / PLANTED >= 0.95, found
    assert not any(is_planted[number] for number in chosen.retain)
