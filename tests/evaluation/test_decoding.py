"""Laws of decoding: cached tokens are those of the whole text; sampling; text that comes in parts."""

import pytest
import torch

from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.evaluation.continuation import TextStream
from megatron_nexus.evaluation.decoding import Decoding
from megatron_nexus.evaluation.loaded_model import LoadedModel
from megatron_nexus.evaluation.sampling import Sampling, draw


def test_rows_of_different_lengths_go_on_as_each_alone(
    loaded: LoadedModel, tokenizer: SentencePieceTokenizer
) -> None:
    prompts = [tokenizer.encode(text) for text in ("She", "Nobody forgets the river", "A boy sees")]
    assert len({len(prompt) for prompt in prompts}) == 3
    decoding = Decoding(loaded, prompts, 8, tokenizer.vocab_size)
    for _ in range(2):
        rows = [list(prompt) for prompt in prompts]
        logits_BV = decoding.first_logits_BV
        assert logits_BV.shape[1] == tokenizer.vocab_size, "ids without a piece are no choice"
        for _ in range(8):
            for row, logits_V in zip(rows, logits_BV, strict=True):
                alone_V = loaded.decoder(torch.tensor([row]))[-1, 0, : tokenizer.vocab_size]
                assert torch.allclose(logits_V, alone_V, rtol=0.0, atol=1e-11)
                row.append(int(logits_V.argmax()))
            logits_BV = decoding.extend([row[-1] for row in rows])
        decoding.restart()


def drawn(logits: torch.Tensor, sampling: Sampling, count: int = 400) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [draw(logits, sampling, generator) for _ in range(count)]


def test_tokens_are_drawn_as_asked() -> None:
    shares = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = shares.log().float()
    assert set(drawn(logits, Sampling(temperature=0.0))) == {1}
    assert set(drawn(logits, Sampling())) == {0, 1, 2, 3}
    assert set(drawn(logits, Sampling(top_k=2))) == {1, 3}
    assert set(drawn(logits, Sampling(top_k=9))) == {0, 1, 2, 3}
    assert set(drawn(logits, Sampling(top_p=0.74))) == {1, 3}
    assert set(drawn(logits, Sampling(top_p=0.76))) == {1, 2, 3}
    assert set(drawn(logits, Sampling(top_p=0.01))) == {1}
    assert drawn(logits, Sampling(temperature=0.7)) == drawn(logits, Sampling(temperature=0.7))
    # At temperature 1/2 probabilities are squared: 0.25 of 0.345; binomial, three standard deviations.
    share = drawn(logits, Sampling(temperature=0.5)).count(1) / 400
    assert share == pytest.approx(0.25 / 0.345, abs=0.07)


@pytest.mark.parametrize(
    "text", ["She opens the door.", "\U0001f680\u4f60\u597d na\u00efve", "a\tb\n\n  c", "\u2581 \ufffd."]
)
def test_parts_add_up_to_the_text_and_hold_whole_characters(
    tokenizer: SentencePieceTokenizer, text: str
) -> None:
    prompt = tokenizer.encode("Nobody sees ")
    stream = TextStream(tokenizer, prompt)
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert "".join([*parts, stream.finish()]) == text


def test_a_long_text_and_cut_off_characters_are_told_too(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("The old man paints the river at night. \U0001f680" * 9)[:-1]
    stream = TextStream(tokenizer, [tokenizer.eod_id])
    streamed = "".join(map(stream.push, ids))
    assert streamed + stream.finish() == tokenizer.decode(ids)
    second_byte = tokenizer.encode("\U0001f680")[1]
    stream = TextStream(tokenizer, tokenizer.encode("She"))
    streamed = "".join(stream.push(second_byte) for _ in range(9))
    assert len(streamed) == 9 - 3, "characters that no later byte can complete do not wait"
