"""Perplexity: every token once, from what fits before it; test_harness.py compares with the harness."""

import math
from pathlib import Path

import pytest
import torch

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.errors import CheckpointError, DataError
from megatron_nexus.evaluation.decoding import Decoding
from megatron_nexus.evaluation.loaded_model import LoadedModel
from megatron_nexus.evaluation.local_scorer import LocalScorer
from megatron_nexus.evaluation.perplexity import measure_perplexity, windows
from tests.support.eval_model import load

TEXT = "The old man opens the door at night.  Why?\nNobody knows \U0001f680.\n" * 7


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_each_token_is_predicted_once_from_what_fits_before_it(stride: int) -> None:
    tokens = list(range(1, 31))
    made = windows(tokens, 0, 8, stride)
    assert [token for window in made for token in window.continuation] == tokens
    row = [0, *tokens]
    for window in made[1:]:
        text = [*window.context, *window.continuation]
        assert len(window.continuation) <= stride
        assert len(text) == 9, "as much context as fits"
        assert text == row[row.index(text[0]) :][:9]


def test_a_text_is_as_perplexing_as_its_tokens(
    loaded: LoadedModel, tokenizer: SentencePieceTokenizer
) -> None:
    scorer, text = LocalScorer(loaded), "She opens the door."
    found = measure_perplexity(scorer, tokenizer, text)
    ids = tokenizer.encode(text)
    log_p_TV = loaded.decoder(torch.tensor([[tokenizer.eod_id, *ids[:-1]]]))[:, 0].log_softmax(dim=1)
    loss = -float(log_p_TV.gather(1, torch.tensor(ids)[:, None]).sum())
    assert found.log_likelihood == pytest.approx(-loss, abs=1e-11)
    assert (found.tokens, found.words, found.bytes) == (len(ids), 4, len(text))
    assert found.per_token == pytest.approx(math.exp(loss / len(ids)))
    assert found.per_word == pytest.approx(math.exp(loss / 4))
    assert found.bits_per_byte == pytest.approx(loss / len(text) / math.log(2))


def test_a_result_that_is_not_finite_is_an_error_that_names_the_checkpoint(
    run: tuple[Path, RunConfig], tokenizer: SentencePieceTokenizer
) -> None:
    broken = load(*run)
    gain = broken.decoder.layers[1].feed_forward.norm.get_parameter("gain")
    gain.fill_(math.inf)
    with pytest.raises(CheckpointError, match=f"{run[0]}: what the model computes is not finite"):
        measure_perplexity(LocalScorer(broken), tokenizer, TEXT)
    with pytest.raises(CheckpointError, match="--verify names"):
        Decoding(broken, [[1, 2]], 3, tokenizer.vocab_size)
    gain.fill_(1.0)
    broken.decoder.layers[-1].projection.get_parameter("weight").mul_(1e200)
    with pytest.raises(CheckpointError, match="perplexity is beyond a float"):
        measure_perplexity(LocalScorer(broken), tokenizer, TEXT)


def test_what_cannot_be_measured_is_told(loaded: LoadedModel, tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match="is empty"):
        measure_perplexity(LocalScorer(loaded), tokenizer, "")
    with pytest.raises(DataError, match="use at most 48"):
        measure_perplexity(LocalScorer(loaded), tokenizer, TEXT, stride=49)
