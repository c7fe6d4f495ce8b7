"""The command `nexus`: its verbs, what their help costs, and its answers to what is not a verb."""

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_nexus.cli.main import main
from megatron_nexus.cli.verbs import GROUPS, VERBS
from megatron_nexus.config.command_line import MAIN_FIELDS, make_parser
from megatron_nexus.config.presets import PRESETS
from tests.support.paths import REPOSITORY

HEAVY = ("torch", "deepspeed", "matplotlib", "lm_eval", "transformers", "datasets", "pyarrow")

REFUSED = (
    "compare",
    "report nowhere",
    "plot nowhere",
    "advise nowhere",
    "analyze nowhere",
    "inspect nowhere",
    "generate --load nowhere",
    "export --load nowhere --output new",
    "train --load nowhere",
    "grow --load nowhere --save new",
)


def call(
    monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a command line."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nexus", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    output = console.readouterr()
    return int(ended.value.code or 0), output.out, output.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--local_rank=0", "--help"]])
def test_alone_it_lists_all_verbs_by_group(
    words: list[str], monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, console, *words)
    assert code == 0 and out.startswith("usage: nexus VERB [flags]\n")
    listed = re.findall(r"^(\w+):$|^  ([\w-]+) +\S", out, re.MULTILINE)
    assert [group or verb for group, verb in listed] == [
        name for group, verbs in GROUPS.items() for name in (group, *verbs)
    ]


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("tarin", "nexus train"), ("upcyle", "nexus upcycle"), ("--tp", "nexus train --tp"), ("?", "--help")],
)
def test_a_word_that_is_not_a_verb_is_answered_with_the_nearest(
    word: str, remedy: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, console, word)
    assert code == 2 and out == "" and repr(word) in err and remedy in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], ["'trian'", "did you mean train?"]),
        (["--num_gpus", "2", "unlearm", "--lr", "1e-5"], ["'unlearm'", "did you mean unlearn?"]),
        (["mine.py", "--tp", "2"], ["'mine.py' cannot be launched", "nexus launch ... train"]),
        (["--num_gpus=2"], ["no verb is named", "nexus launch ... train"]),
    ],
)
def test_what_cannot_be_launched_is_answered_with_the_verb_nearest_to_it(
    words: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, console, "launch", *words)
    assert code == 2 and all(part in err for part in said), err


def test_help_and_refusals_of_a_missing_run_import_nothing_heavy_and_usage_lines_are_short() -> None:
    program = (
        "import sys, json\n"
        "from megatron_nexus.cli.main import main\n"
        "from megatron_nexus.cli.verbs import VERBS\n"
        "for verb in VERBS:\n"
        "    sys.argv = ['/usr/bin/nexus', verb, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert not ended.code\n"
        f"for line in {REFUSED}:\n"
        "    sys.argv = ['/usr/bin/nexus', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert ended.code == 2, line\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []
    usages = re.findall(r"^usage: nexus (\S+) (.*)\n\n", done.stdout, re.MULTILINE)
    assert [verb for verb, _ in usages] == list(VERBS)
    assert all(len(flags) < 80 for _, flags in usages), usages
    retrieve = dict(usages)["retrieve"]
    assert all(flag in retrieve for flag in ("--load", "--corpus", "--queries", "--forget", "--retain"))


def test_help_of_train_begins_with_the_flags_that_matter_and_has_each_flag_once() -> None:
    text = make_parser().format_help()
    flags = re.findall(r"^  (?:.*, )?(--(?!no-)[\w-]+)(?: |$)", text, re.MULTILINE)
    assert len(MAIN_FIELDS) + 1 == 10
    assert flags[:10] == [
        *("--preset", "--data-path", "--tokenizer-model", "--tp", "--pp"),
        *("--global-batch-size", "--train-iters", "--lr", "--save", "--load"),
    ]
    assert len(set(flags)) == len(flags) > 70


def test_presets_are_listed_with_the_sizes_of_the_built_models(
    monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, console, "presets", "--json")
    rows = {row["preset"]: row for row in json.loads(out)}
    assert code == 0 and list(rows) == list(PRESETS)
    # docs/paper_numbers.md has the arithmetic.
    assert rows["nexusformer-240m"]["parameters"] == 187_936_512
    assert (rows["nexusformer-240m"]["M"], rows["nexusformer-240m"]["A"]) == (780, 960)
    assert rows["qwen3-240m"]["parameters"] == 267_694_144
    code, out, _ = call(monkeypatch, console, "presets")
    assert code == 0 and all(re.search(rf"^  {re.escape(name)} .*\w", out, re.MULTILINE) for name in PRESETS)
    assert "187,936,512" in out


@pytest.mark.parametrize("verb", ["train", "grow --load x --save y", "count"])
def test_a_preset_that_does_not_exist_is_answered_with_the_nearest_and_the_list(
    verb: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, console, *verb.split(), "--preset", "nexusformer-24m")
    assert code == 2 and "--preset" in err and "nexusformer-240m" in err and "`nexus presets`" in err
    assert "qwen3" not in err


def test_a_shell_completes_verbs_and_flags(
    monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    code, script, _ = call(monkeypatch, console, "completion", "bash")
    assert code == 0
    ask = """
    COMP_WORDS=(nexus tr); COMP_CWORD=1; _shtab_nexus; echo "${COMPREPLY[@]}"
    COMP_WORDS=(nexus grow --nexus); COMP_CWORD=2; _shtab_nexus; echo "${COMPREPLY[@]}"
    COMP_WORDS=(nexus count --js); COMP_CWORD=2; _shtab_nexus; echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train train-tokenizer", "--nexus-m --nexus-a", "--json"]
