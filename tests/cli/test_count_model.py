"""The command that counts a model: what it prints, what it starts (nothing), and the page that quotes it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nexus.cli.count import count
from megatron_nexus.config.paper import PRINTED_FLOPS_PER_TOKEN, PRINTED_SIZES
from megatron_nexus.config.presets import PRESETS
from megatron_nexus.errors import ConfigError
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.cost import parameter_count
from tests.support import checkpoints
from tests.support.paths import REPOSITORY
from tests.support.verbs import CallVerb
from tests.support.waiting import TIMEOUT_S

PAGE = REPOSITORY / "docs" / "paper_numbers.md"
TEXT = PAGE.read_text()
QUOTED = re.findall(r"```console\n\$ python tools/count_model\.py (.*?)\n(.*?)```", TEXT, re.DOTALL)
CALCULATED = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", TEXT, re.DOTALL)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import atexit, sys\n"
        "def started():\n"
        "    d = sys.modules.get('torch.distributed')\n"
        "    if d and d.is_initialized(): sys.stderr.write('a process group was started')\n"
        "    if 'deepspeed' in sys.modules: sys.stderr.write('imports deepspeed')\n"
        "atexit.register(started)\n"
        "from megatron_nexus.cli.main import main; main('count')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize(("words", "printed"), QUOTED, ids=[words for words, _ in QUOTED])
def test_the_page_quotes_what_the_command_prints(words: str, printed: str) -> None:
    lines = [line.rstrip() for line in count(shlex.split(words))]
    assert printed.splitlines() == lines, f"paste the output of count_model.py {words} into {PAGE.name}"


@pytest.mark.parametrize(("program", "printed"), CALCULATED, ids=range(len(CALCULATED)))
def test_the_page_calculates_what_it_says(
    program: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(program, {})
    assert capsys.readouterr().out == printed


def test_all_of_the_page_was_found() -> None:
    assert "--all" in [words for words, _ in QUOTED]
    assert len(QUOTED) + 2 * len(CALCULATED) == TEXT.count("\n```") // 2


def test_every_preset_has_a_row_and_the_paper_s_other_sizes_one_of_their_own() -> None:
    rows = {row["name"]: row for row in json.loads("\n".join(count(["--all", "--json"])))}
    printed = {f"{preset} as printed" for preset in PRINTED_SIZES.keys() & PRESETS.keys()}
    assert PRESETS.keys() <= rows.keys() <= PRESETS.keys() | printed
    assert rows["nexusformer-440m as printed"]["parameters"] == 370_098_464
    assert rows["nexusformer-440m as printed"]["paper"]["parameters"] == 440_000_000
    for preset, flops in PRINTED_FLOPS_PER_TOKEN.items():
        assert rows[preset]["paper"]["flops_per_token"] == flops
    base = rows["nexusformer-240m"]
    assert base["paper"]["parameters_deviation"] == pytest.approx(100 * (187_936_512 / 240e6 - 1))
    assert base["paper"]["flops_deviation"] == pytest.approx(
        100 * (base["flops_per_token"]["forward"] / 425.6e6 - 1)
    )
    assert base["non_embedding_parameters"] == 187_936_512 - 2 * 32_000 * 768


def test_flags_change_sizes_and_lay_the_model_on_ranks() -> None:
    output = "\n".join(count(shlex.split("--preset nexusformer-240m --nexus-m 1088 --nexus-a 1228 --tp 2")))
    assert output.startswith("nexusformer-240m, resized: 225,003,264 parameters\n"), (
        "another model has no name"
    )
    assert "tensor 2 x pipeline 1 x data 1, ZeRO 1" in output
    halves = json.loads("\n".join(count(["--tp", "2", "--pp", "2", "--json"])))
    assert len(halves["bytes_per_rank_of_each_stage"]) == 2


@pytest.mark.slow
def test_a_checkpoint_is_counted_and_nothing_is_started(tmp_path: Path) -> None:
    config = checkpoints.configure()
    checkpoint = checkpoints.write_checkpoint(tmp_path, config, tp=2)
    done = run("--load", checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{parameter_count(decoder_specs(config.model).values()):,} parameters" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--all --preset qwen3-tiny", "--all counts every preset: drop it, or drop --preset"),
        ("--preset nexusformer-240m --tp 5", "--tp 5 does not divide --num-attention-heads 12"),
        ("--nexus-n 3", "did you mean --nexus-m?"),
        ("--tp 2 --world-size 3", "the world has 3 ranks"),
    ],
)
def test_wrong_flags_are_answered_as_a_run_answers(words: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        count(words.split())


def test_the_tool_ends_with_code_2(call_verb: CallVerb) -> None:
    code, output = call_verb("count", "--all --load nowhere")
    assert code == 2
    assert output.startswith("ConfigError: ") and "Traceback" not in output
