"""Laws of prompts with answers: the loss is of the answer's tokens, whatever is cut, padded or written."""

import json
from pathlib import Path

import pytest
import torch

from megatron_nexus.data.answers import Answer, read_answers, tokenize_answer, tokenize_answers
from megatron_nexus.data.loader import answer_batch
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import ConfigError, DataError, path_errors
from tests.support.eval_model import write_tokenizer

LONG = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def answer_text(tokenizer: Tokenizer, labels: tuple[int, ...]) -> str:
    return tokenizer.decode([label for label in labels if label >= 0])


@pytest.mark.parametrize("prompt", ["She opens the", "She opens the ", "", "the ri"])
def test_the_labels_are_the_tokens_of_the_answer(prompt: str, tokenizer: Tokenizer) -> None:
    found, cut = tokenize_answer(Answer(prompt, "river at night", "f:1"), tokenizer, LONG)
    assert cut == 0
    assert tokenizer.decode(list(found.ids)).endswith(prompt + "river at night")
    asked = answer_text(tokenizer, found.labels)
    # A token that begins in the prompt is the answer's.
    assert asked.endswith("river at night") and (prompt + "river at night").endswith(asked)
    assert len(found.tokens) == len(found.labels) and found.answer_start >= 1


def test_all_of_a_text_is_asked_for(tokenizer: Tokenizer) -> None:
    found, _ = tokenize_answer(Answer(None, "A boy sees the river", "f:1"), tokenizer, LONG)
    assert answer_text(tokenizer, found.labels) == "A boy sees the river"
    assert found.ids[0] == (tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id)


def test_a_prompt_is_cut_at_its_beginning_a_text_at_its_end(tokenizer: Tokenizer) -> None:
    whole, _ = tokenize_answer(Answer("She opens the door", " at night", "f:1"), tokenizer, LONG)
    size = len(whole.ids) - 2
    short, cut = tokenize_answer(Answer("She opens the door", " at night", "f:1"), tokenizer, size)
    assert cut == 1 and short.ids == whole.ids[1:]
    assert answer_text(tokenizer, short.labels) == " at night"
    text, cut = tokenize_answer(Answer(None, "She opens the door at night", "f:1"), tokenizer, 3)
    assert len(text.tokens) == 3 and cut > 0
    with pytest.raises(DataError, match=r"f:1.*at most 2") as error:
        tokenize_answers([Answer("She", " opens the door at night", "f:1")], tokenizer, 2)
    assert "shorten" in str(error.value)


def test_a_batch_is_padded_where_nothing_is_asked(tokenizer: Tokenizer) -> None:
    samples, cut = tokenize_answers(
        [Answer("She opens", " the door", "f:1"), Answer(None, "A boy", "f:2")], tokenizer, LONG
    )
    tokens_BT, labels_BT, mask_BT = answer_batch(samples, width=LONG)
    assert cut == 0 and tokens_BT.shape == labels_BT.shape == mask_BT.shape == (2, LONG)
    for b, sample in enumerate(samples):
        assert tokens_BT[b, : len(sample.tokens)].tolist() == list(sample.tokens)
        asked = [label for label in sample.labels if label >= 0]
        assert labels_BT[b][mask_BT[b] == 1.0].tolist() == asked
    assert int(labels_BT.min()) >= 0 and mask_BT.dtype == torch.float32


def test_lines_are_read_in_both_forms_with_other_fields_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "forget.jsonl"
    lines = [
        {"index": 3, "score": 0.5, "rank": 0, "side": "forget", "prompt": "a", "answer": "b"},
        {"text": "c", "side": "retain"},
    ]
    # As Windows' editors write it.
    path.write_text("\r\n\r\n".join(map(json.dumps, lines)) + "\r\n", encoding="utf-8-sig", newline="")
    answers = read_answers(path)
    assert [answer.fields() for answer in answers] == [{"prompt": "a", "answer": "b"}, {"text": "c"}]
    assert answers[1].source == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"}', "no key 'answer'"),
        ('{"question": "a"}', "no key 'text', only 'question'"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": 7}', "'text' is 7"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ("", "no line with a text"),
    ],
)
def test_a_wrong_line_is_named_with_its_remedy(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError) as error:
        read_answers(path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert '{"prompt": "...", "answer": "..."}' in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"), path_errors():
        read_answers(tmp_path / "none.jsonl")
