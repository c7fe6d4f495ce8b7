"""The base model in this process: loaded from its checkpoint, scored, and reset to it for each cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from corpora import Sample
from torch import Tensor

from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import Answer, AnswerTokens, tokenize_answer
from megatron_nexus.data.loader import answer_batch
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.evaluation.loaded_model import load_model
from megatron_nexus.models.decoder import DecoderStage, Loss
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard

SEQ_LENGTH = 40
"""Tokens of a sample: the longest question and answer of the corpus have fewer."""


@dataclass(frozen=True)
class LoadedBase:
    """A decoder with gradients, and its tokenizer."""

    decoder: DecoderStage
    loss: Loss
    tokenizer: Tokenizer
    weights: dict[str, Tensor]

    def reset(self) -> None:
        """Give the decoder the base model's weights."""
        self.decoder.load_state_dict(self.weights)

    def tokens(self, samples: Sequence[Sample]) -> list[AnswerTokens]:
        """Return the samples' token ids."""
        answers = [Answer(sample.prompt, sample.answer, sample.prompt) for sample in samples]
        return [tokenize_answer(answer, self.tokenizer, SEQ_LENGTH)[0] for answer in answers]

    def answer_loss(self, samples: Sequence[Sample]) -> Tensor:
        """Return the mean over samples of the mean negative log-likelihood of the answer's tokens."""
        tokens_BT, labels_BT, mask_BT = answer_batch(self.tokens(samples))
        log_p_TBV = self.decoder(tokens_BT).log_softmax(-1)
        nll_BT = -log_p_TBV.transpose(0, 1).gather(-1, labels_BT[..., None])[..., 0] * mask_BT
        mean: Tensor = (nll_BT.sum(1) / mask_BT.sum(1)).mean()
        return mean

    @torch.no_grad()
    def probability(self, answers: Sequence[AnswerTokens]) -> float:
        """Return the mean over answers of exp of the mean log-probability of their tokens (Q_A_Prob)."""
        tokens_BT, labels_BT, mask_BT = answer_batch(answers)
        scores_BT = self.loss.token_scores(self.decoder(tokens_BT), labels_BT)[0]
        return float(((scores_BT * mask_BT).sum(1) / mask_BT.sum(1)).exp().mean())


@dataclass(frozen=True)
class Base:
    """The run of a base model."""

    run: Path

    @cached_property
    def saved(self) -> SavedRun:
        """Its newest checkpoint."""
        return open_saved_run(location(str(self.run)))

    @property
    def config(self) -> RunConfig:
        """The configuration of its run."""
        return self.saved.config

    def load(self) -> LoadedBase:
        """Return the model, its weights in float32."""
        model = self.config.model
        loaded = load_model(self.saved.checkpoint, model, SEQ_LENGTH, torch.device("cpu"), torch.float32)
        decoder = loaded.decoder.requires_grad_(True)
        weights = {name: weight.clone() for name, weight in decoder.state_dict().items()}
        loss = Loss(model, TensorParallel(None), Shard(0, 1))
        return LoadedBase(decoder, loss, open_tokenizer(Path(self.config.data.tokenizer_model)), weights)
