"""The command that generates, as users run it."""

import io
import sys
from pathlib import Path

import pytest

from megatron_nexus.config.run_config import RunConfig
from tests.cli.test_data_tools import call

Console = pytest.CaptureFixture[str]


def test_text_goes_to_stdout_and_a_seed_repeats_it(
    run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    flags = ("--load", run[0].parent, "--max-new-tokens", 12, "--top-k", 50, "--device", "cpu")
    made = [
        call("generate", monkeypatch, console, *flags, "--prompt", "She opens ", "--seed", seed)
        for seed in (5, 5, 6)
    ]
    assert [code for code, _, _ in made] == [0, 0, 0], made
    assert all(out.startswith("She opens ") for _, out, _ in made)
    assert made[0][1] == made[1][1] != made[2][1]
    assert "12 tokens" in made[0][2] or "tokens/s" in made[0][2]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"She opens \n")))
    code, out, _ = call("generate", monkeypatch, console, *flags, "--num-samples", 2, "--seed", 5)
    assert code == 0
    samples = out.split("--- sample ")[1:]
    assert [sample.split("\n", 1)[1] for sample in samples] == [made[0][1], made[2][1]]


def test_an_empty_prompt_begins_a_document(
    run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    words = ("--load", run[0], "--prompt", "", "--temperature", 0, "--max-new-tokens", 60)
    code, out, err = call("generate", monkeypatch, console, *words)
    assert code == 0, err
    assert out
    assert "has never seen such positions" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--load", "nowhere"), "CheckpointError: nowhere: no such folder"),
        (("--prompt", "\udcff"), "DataError: the prompt is not UTF-8 text"),
        (("--top-p", "0"), "--top-p: 0 must be above 0 and at most 1"),
        (("--temperature", "-1"), "--temperature: -1 must be a finite number, 0 or above"),
        (("--tokenizer-model", "gone.model"), "DataError: the tokenizer model gone.model cannot be read"),
    ],
)
def test_mistakes_are_answered(
    words: tuple[str, str],
    expected: str,
    run: tuple[Path, RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    console: Console,
) -> None:
    code, out, err = call("generate", monkeypatch, console, "--load", run[0], "--prompt", "x", *words)
    assert code == 2
    assert out == ""
    assert expected in err
    assert "Traceback" not in err
