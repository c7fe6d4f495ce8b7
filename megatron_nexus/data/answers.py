"""Prompts with answers, as .jsonl files have them: to be unlearned, to be kept, or to search a corpus by.

    {"prompt": "Who wrote it?", "answer": " Ada."}      the loss is of the answer's tokens
    {"text": "It was written by Ada."}                  the loss is of all tokens

Other fields are left alone, so that what `nexus retrieve` writes can be read again.
"""

from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megatron_nexus.base.durable import naming_errors
from megatron_nexus.base.json_text import parse_record
from megatron_nexus.data.tokenizer import Tokenizer, encode_prompt
from megatron_nexus.errors import DataError

IGNORED_LABEL = -100
"""The label of a token without loss: torch's and Hugging Face's `ignore_index`."""
SHOWN_PROBLEMS = 10
_FORM = '{"prompt": "...", "answer": "..."} or {"text": "..."}'


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer; a text that is all answer has no prompt."""

    prompt: str | None
    answer: str
    source: str
    """File and line."""

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return (self.prompt or "") + self.answer

    def fields(self) -> dict[str, str]:
        """Return the fields of its line, by name."""
        if self.prompt is None:
            return {"text": self.answer}
        return {"prompt": self.prompt, "answer": self.answer}


@dataclass(frozen=True)
class AnswerTokens:
    """The token ids of a prompt with its answer."""

    ids: tuple[int, ...]
    answer_start: int
    """Which of them is the first of the answer; 1 or more."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the model reads: all but the last."""
        return self.ids[:-1]

    @property
    def labels(self) -> tuple[int, ...]:
        """What it is to predict after each; IGNORED_LABEL in the prompt."""
        asked = self.answer_start - 1
        return (IGNORED_LABEL,) * asked + self.ids[self.answer_start :]


def read_answers(path: Path) -> list[Answer]:
    """Return the prompts and answers of a .jsonl file, blank lines left out.

    Raises DataError, which names the first lines that are neither form, or says that there is none; OSError.
    """
    with naming_errors(path):
        lines = path.read_bytes().split(b"\n")
    lines[0] = lines[0].removeprefix(BOM_UTF8)
    answers: list[Answer] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _answer(line, f"{path}:{number}")
        if isinstance(found, Answer):
            answers.append(found)
        else:
            problems.append(f"{path}:{number}: {found}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = problems[:SHOWN_PROBLEMS] + ([f"and {more:,} more lines"] if more > 0 else [])
        raise DataError("\n".join([*shown, f"write each line as {_FORM}, or remove it"]))
    if not answers:
        raise DataError(f"{path} holds no line with a text: write lines such as {_FORM}")
    return answers


def _answer(line: bytes, source: str) -> Answer | str:
    """Return what a line holds, or what is wrong with it."""
    try:
        record = parse_record(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(record, dict):
        return "not a JSON object"
    names = ("prompt", "answer") if "prompt" in record or "answer" in record else ("text",)
    for name in names:
        if name not in record:
            return f"no key {name!r}, only {', '.join(map(repr, record)) or 'none'}"
        if not isinstance(record[name], str):
            return f"{name!r} is {record[name]!r:.40}, not a string"
        try:
            record[name].encode()
        except UnicodeEncodeError:
            return f"{name!r} holds a lone surrogate"
    if not record[names[-1]]:
        return f"{names[-1]!r} is empty, and the loss is of its tokens"
    if names == ("text",):
        return Answer(None, record["text"], source)
    return Answer(record["prompt"], record["answer"], source)


def tokenize_answer(answer: Answer, tokenizer: Tokenizer, seq_length: int) -> tuple[AnswerTokens, int]:
    """Return the token ids of a prompt with its answer, and how many tokens were cut off.

    The text is tokenized as a whole, as in a corpus; a token that begins in the prompt and ends in the answer
    is the answer's. No end-of-document token is added. What a model of `seq_length` tokens cannot read is cut
    off: the beginning of a prompt, the end of a text.

    Raises DataError: the answer alone is longer, or has no token.
    """
    ids = encode_prompt(tokenizer, "")
    first = len(ids)
    if answer.prompt is None:
        ids += tokenizer.encode(answer.answer)
        if len(ids) == first:
            raise _without_tokens(answer)
        kept = ids[: seq_length + 1]
        return AnswerTokens(tuple(kept), first), len(ids) - len(kept)
    if answer.prompt and not tokenizer.document_prefix:
        ids, first = [], 0  # a prompt is context enough
    own = tokenizer.encode(answer.prompt)
    whole = tokenizer.encode(answer.text)
    if not whole:
        raise _without_tokens(answer)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, whole, strict=False)))
    shared = min(shared, len(whole) - 1)  # the answer has one token at least
    start, ids = first + shared, ids + whole
    if start == 0:
        ids, start = encode_prompt(tokenizer, "") + ids, 1
    cut = max(0, len(ids) - (seq_length + 1))
    if cut >= start:
        raise DataError(
            f"{answer.source}: the answer has {len(ids) - start:,} tokens, a sample of the model at most "
            f"{seq_length:,}: shorten it, divide it in lines, or remove the line"
        )
    return AnswerTokens(tuple(ids[cut:]), start - cut), cut


def _without_tokens(answer: Answer) -> DataError:
    return DataError(f"{answer.source}: the tokenizer makes no token of {answer.text!r:.40}: remove the line")


def tokenize_answers(
    answers: Sequence[Answer], tokenizer: Tokenizer, seq_length: int
) -> tuple[list[AnswerTokens], int]:
    """Return the token ids of each, and how many of them were cut. Raises DataError as `tokenize_answer`."""
    found, cut = [], 0
    for answer in answers:
        tokens, lost = tokenize_answer(answer, tokenizer, seq_length)
        found.append(tokens)
        cut += lost > 0
    return found, cut
