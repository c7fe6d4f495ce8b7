"""`--dry-run`: what it prints, what it starts (nothing), and its plan against the real engine's tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import Value
from megatron_nexus.planner.memory import plan_memory
from tests.planner.small_model import SMALL
from tests.support.cli import assert_refused
from tests.support.paths import REPOSITORY
from tests.support.ranks import run_ranks
from tests.support.subprocesses import LAUNCHER_VARIABLES
from tests.support.verbs import CallVerb
from tests.support.waiting import TIMEOUT_S

WORKER = Path(__file__).with_name("memory_worker.py")
SMALL_BUCKETS = Path(__file__).with_name("small_buckets.json")  # DeepSpeed's are 2 GB and never filled here
CASES: list[tuple[int, dict[str, Value]]] = [
    (1, {"precision": "fp32", "recompute_granularity": "selective"}),
    (1, {"precision": "fp32", "recompute_granularity": "full", "nexus_inner_norm": True}),
    (2, {"precision": "bf16"}),
    (
        2,
        {
            "precision": "bf16",
            "zero_stage": 2,
            "global_batch_size": 4,
            "deepspeed_config": str(SMALL_BUCKETS),
        },
    ),
    (2, {"precision": "fp32", "zero_stage": 3, "deepspeed_config": str(SMALL_BUCKETS)}),
    (2, {"precision": "fp32", "tensor_model_parallel_size": 2, "attention_order": 2, "num_query_groups": 2}),
    (
        2,
        {
            "precision": "bf16",
            "pipeline_model_parallel_size": 2,
            "projection": "pattention",
            "pattention_slots": 70,
            "feed_forward": "pattention",
            "normalization": "NonParametricLayerNorm",
        },
    ),
]


def dry_run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The real command, which also says whether it has started or imported what it must not."""
    program = (
        "import atexit, sys, socket\n"
        "def refuse(*a): raise AssertionError('a port was taken')\n"
        "socket.socket.bind = refuse\n"
        "atexit.register(lambda: 'deepspeed' in sys.modules and sys.stderr.write('imports deepspeed'))\n"
        "def started():\n"
        "    d = sys.modules.get('torch.distributed')\n"
        "    if d and d.is_initialized(): sys.stderr.write('a process group was started')\n"
        "atexit.register(started)\n"
        "from megatron_nexus.cli.main import main; main('train')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {"PYTHONPATH": str(REPOSITORY), **(env or {})}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


@pytest.mark.slow
def test_it_tells_configuration_costs_and_memory_and_starts_nothing(tmp_path: Path) -> None:
    done = dry_run(
        "--dry-run", "--preset", "nexusformer-240m", "--tp", "2", "--pp", "2", "--save", str(tmp_path / "run")
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "preset: nexusformer-240m" in done.stdout
    assert "tensor_model_parallel_size: 2" in done.stdout
    assert "nexusformer-240m: 187,936,512 parameters; the paper calls it 240M" in done.stdout
    assert "tensor 2 x pipeline 2 x data 1 = 4 ranks" in done.stdout
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.strip()[:3] in ("0-1", "2-3")]
    assert rows == ["0-1", "2-3"]
    assert done.stdout.index("\nranks") < done.stdout.index("\npreset: "), "numbers come first"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_that_hold_the_same_share_a_row_and_only_rank_0_speaks() -> None:
    words = ("--dry-run", "--tp", "2", "--world-size", "4", "--train-iters", "7", "--device", "h100")
    done = dry_run(*words)
    assert done.returncode == 0, done.stderr
    assert "tensor 2 x pipeline 1 x data 2 = 4 ranks" in done.stdout
    assert any(line.split()[:1] == ["0-3"] for line in done.stdout.splitlines())
    assert "predicted, not measured" in done.stdout and "machine" not in done.stdout
    place = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    other = dry_run(*words, env=place)
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--dry-run --tp 3 --lr 0 --global-batch-size 33 --world-size 6",
            ["3 problems", "--tp 3 does not divide", "--lr 0.0 must be", "--global-batch-size 33 is not"],
        ),
        ("--world-size 4", ["--world-size 4 belongs to --dry-run: add it"]),
        ("--device h100", ["--device h100 belongs to --dry-run: add it"]),
        ("--dry-run --search", ["--search", "give --device"]),
        ("--dry-run --device h10", ["--device 'h10'", "h100 is the nearest"]),
        ("--dry-run --world-size 0", ["--world-size 0 must be positive"]),
        ("--dry-run --world-size 3 --tp 2", ["the world has 3 ranks", "start 2 ranks"]),
    ],
)
def test_every_problem_at_once(
    words: str, expected: list[str], call_verb: CallVerb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    code, output = call_verb("train", words)
    assert_refused(code, output, "ConfigError", *expected)
    assert output.startswith("ConfigError: "), "nothing is printed before it"


@pytest.mark.slow
def test_a_problem_is_answered_before_anything_starts() -> None:
    done = dry_run("--dry-run", "--world-size", "3", "--tp", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert_refused(2, done.stderr, "ConfigError", "the world has 3 ranks", "start 2 ranks")
    assert done.stderr.endswith(" --pp\n"), "what else would be said at exit"


@pytest.mark.parametrize(("ranks", "flags"), CASES, ids=lambda value: str(value))
@pytest.mark.law
@pytest.mark.torch_versions
def test_the_plan_is_what_the_engine_holds(ranks: int, flags: dict[str, Value], tmp_path: Path) -> None:
    """Weights and optimizer exactly; the peak of a step within 2 %: scalars are not planned.

    gloo frees tensors in threads that the profiler does not see: what a step seems to leave behind may or
    may not have been held at its peak. gloo's own copies of what it sends are not planned: 8 %.
    """
    run_ranks(ranks, WORKER, json.dumps({**SMALL, **flags}), str(tmp_path))
    config = build({**SMALL, **flags})
    tolerance = 0.02 if config.model_parallel_size == 1 else 0.08
    plan = plan_memory(config, ranks, "cpu")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    share = ranks // len(plan)
    for stage, memory in enumerate(plan):
        of_stage = seen[stage * share : (stage + 1) * share]
        for record in of_stage:
            assert memory.columns["weights"] == record["weights"]
            assert memory.columns["optimizer"] == record["optimizer"]
        # The plan is of the rank that holds most.
        assert max(r["peak"] - r["unseen"] for r in of_stage) * (1 - tolerance) <= memory.peak
        assert memory.peak <= max(r["peak"] for r in of_stage) * (1 + tolerance)
