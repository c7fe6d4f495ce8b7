"""Law: a score is the sum of log-probabilities of the whole text run alone; float64, to 1e-11."""

import random
from pathlib import Path

import pytest
import torch

from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.errors import DataError
from megatron_nexus.evaluation.loaded_model import LoadedModel
from megatron_nexus.evaluation.local_scorer import LocalScorer, make_rows
from megatron_nexus.models.scores import Request, Score
from tests.support import eval_model
from tests.support.cases import first_by_default


def alone(loaded: LoadedModel, request: Request) -> Score:
    """The score of a request by itself, of the last tokens that the model sees."""
    text = [*request.context, *request.continuation][-(loaded.seq_length + 1) :]
    count = len(request.continuation)
    log_p_TV = loaded.decoder(torch.tensor([text[:-1]]))[-count:, 0].log_softmax(dim=1)
    tokens = torch.tensor(text[-count:])
    return Score(float(log_p_TV.gather(1, tokens[:, None]).sum()), bool((log_p_TV.argmax(1) == tokens).all()))


def requests(loaded: LoadedModel) -> list[Request]:
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(loaded.model.vocab_size) for _ in range(count))

    made = [Request(tokens(rng.randint(1, 30)), tokens(rng.randint(1, 9))) for _ in range(10)]
    shared = [(tokens(12), 4, 6), (tokens(20), 5, 1), (tokens(3), 3, 17), (tokens(60), 4, 5)]
    made += [Request(context, tokens(most)) for context, count, most in shared for _ in range(count)]
    made += [Request(shared[0][0], tokens(1)), made[0], Request(tokens(1), tokens(loaded.seq_length))]
    # One whose tokens are the likeliest ones.
    best = loaded.decoder(torch.tensor([shared[0][0]]))[-1, 0].argmax()
    made.append(Request(shared[0][0], (int(best),)))
    rng.shuffle(made)
    return made


@pytest.mark.parametrize(
    "kind",
    first_by_default(
        2,
        [
            {"attention_order": 2},
            {"sliding_window": 7, "no_rope_freq": 2},
            {},
            {"projection": "linear", "num_query_groups": 1},
        ],
    ),
    ids=str,
)
def test_each_score_is_that_of_the_request_alone_in_every_family(
    kind: dict[str, object], tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    loaded = eval_model.load(*eval_model.write_run(tmp_path, tokenizer.model_path, **kind))
    asked = requests(loaded)
    found = LocalScorer(loaded, tokens_per_pass=512).score(asked)
    for mine, request in zip(found, asked, strict=True):
        assert mine.log_likelihood == pytest.approx(alone(loaded, request).log_likelihood, abs=1e-11)


@pytest.mark.parametrize("tokens_per_pass", [1, 64, 4096])
def test_each_score_is_that_of_the_request_alone(loaded: LoadedModel, tokens_per_pass: int) -> None:
    asked = requests(loaded)
    assert any(len(request.context) + len(request.continuation) > loaded.seq_length + 1 for request in asked)
    expected = [alone(loaded, request) for request in asked]
    assert {score.greedy for score in expected} == {False, True}
    found = LocalScorer(loaded, tokens_per_pass).score(asked)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-11)
        assert mine.greedy == theirs.greedy


def test_a_shared_context_is_computed_once() -> None:
    context = tuple(range(10))
    asked = [
        Request(context, (1, 2, 3)),
        Request(context, (4,)),
        Request(context, (5, 6)),
        Request((1,), (2,)),
    ]
    rows = make_rows(asked, longest=48)
    assert [len(row.tokens) for row in rows] == [10 + 2 + 0 + 1, 1]
    assert [row.branches for row in rows] == [2, 0]
    assert [len(row.tokens) for row in make_rows(asked, longest=12)] == [12, 11, 1]


def test_a_continuation_that_does_not_fit_is_told(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="49 tokens cannot be scored by a model that sees 48"):
        LocalScorer(loaded).score([Request((1,), (2,) * 49)])
