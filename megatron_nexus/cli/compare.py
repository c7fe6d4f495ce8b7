"""The verb `compare`: which activation, gradient or state differs first between two runs.

    nexus compare --preset nexusformer-tiny --a "--tp 1" --b "--tp 2 --pp 2"
    nexus compare runs/a runs/b
    nexus compare --record before --tp 2        then, with other code: nexus compare before --b "--tp 2"

Each side trains a few steps in processes of its own and records them; the recordings are compared in the
order of execution.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.api import run_program
from megatron_nexus.base.durable import LOCK_FILE, exclusive_lock
from megatron_nexus.base.invocation import command, program_words
from megatron_nexus.checkpoint.location import SCHEME, location
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.cli.arguments import positive
from megatron_nexus.cli.recorded_run import record
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.comparison.difference_report import report
from megatron_nexus.comparison.first_difference import compare, differing
from megatron_nexus.comparison.recording import RECORDING_FILE, Recording
from megatron_nexus.config.command_line import given_flags
from megatron_nexus.config.config_file import CONFIG_FILE
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError, NexusError, raise_problems

EXIT_CODE_DIFFERENT = 1
SCRATCH = "nexus-compare-"
"""What names of temporary folders begin with."""


def make_parser() -> FlagParser:
    """Return the parser of the verb's own flags; those of train follow them."""
    parser = FlagParser(
        "compare",
        "[RUN_A RUN_B] [--a FLAGS] [--b FLAGS] [flags]",
        description="Run both sides for a few steps, in float64 unless --fp32 or --bf16 is given, and name "
        "the first activation, gradient or optimizer state that differs beyond rounding. RUN_A and RUN_B, "
        "which come first, are runs, checkpoints or recordings; without them both sides are what the flags "
        "of `nexus train` say. Exit code 0: equal, 1: different, 2: cannot be compared.",
    )
    side = 'flags of side %s alone, quoted, such as "--tp 2 --world-size 4"'
    flag = parser.add_flag
    flag("--a", side % "A", type=shlex.split, default=[], metavar="FLAGS")
    flag("--b", side % "B", type=shlex.split, default=[], metavar="FLAGS")
    flag("--steps", "optimizer steps (default: 2)", type=positive(int), default=2)
    text = "samples of a batch whose activations are recorded, evenly from all of it (default: 4)"
    flag("--samples", text, type=positive(int), default=4)
    flag(
        "--rtol",
        "what may differ, as a share of a tensor's largest element (default: 1e-9; with --fp32 1e-4, "
        "with --bf16 0.1)",
        type=positive(float),
    )
    flag("--world-size", "ranks of a side on this machine (default: tp x pp)", type=positive(int))
    flag("--record", "record one side there, and compare nothing", type=Path, metavar="FOLDER")
    flag("--keep", "keep the recordings of both sides there", type=Path, metavar="FOLDER")
    flag("--all", "list every tensor that differs, not the first few", action="store_true")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus compare` with the flags `argv`; the exit code says whether there is a difference."""
    words = list(argv)
    runs = []
    while words and not words[0].startswith("-"):
        runs.append(words.pop(0))
    if {"-h", "--help", "--version"} & set(words):
        make_parser().parse_args(words)
    own, flags = make_parser().parse_known_args(words)
    if own.record is not None:
        if runs or own.a or own.b or own.keep:
            raise ConfigError("--record records one side: drop RUN, --a, --b and --keep; name it by --load")
        record(own, flags, argv)
        return
    if len(runs) > 2:
        raise ConfigError(f"{len(runs)} runs were given: compare two")
    if not argv:
        raise ConfigError(f"nothing to compare: give two runs, or such as {command('compare')} --b '--tp 2'")
    if len(runs) == 1 and not own.b and not flags:
        raise ConfigError(
            f"{runs[0]} alone was given: name another run or recording, or the same with --b, such as --b "
            '"--tp 2"'
        )
    sides = [
        _side(name, place, flags, more, own)
        for name, place, more in zip("AB", [*runs, None, None][:2], (own.a, own.b), strict=True)
    ]
    if all(configs := [side.config for side in sides]):  # else the recordings say it
        facts = [asdict(one.model) | {"seq_length": one.training.seq_length} for one in configs if one]
        raise_problems(differing(facts[0], facts[1], "compare runs of one model"))
    with nullcontext(own.keep) if own.keep else _scratch_folder() as keep:
        a, b = (Recording(_recorded(side, own, keep / side.name.lower())) for side in sides)
        found = compare(a, b, own.rtol)
        log.show(report(a, b, found, own.all))
    sys.exit(EXIT_CODE_DIFFERENT if found.differences else 0)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Yield a folder for recordings that are not kept; remove those that killed comparisons have left."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/{LOCK_FILE}"):
        with suppress(OSError), exclusive_lock(left, create=False):  # whose process is gone
            shutil.rmtree(left.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch,
        exclusive_lock(Path(scratch) / LOCK_FILE),
    ):
        yield Path(scratch)


@dataclass(frozen=True)
class Side:
    """A side: its recording, or the flags of train that it is recorded with, and its ranks where given."""

    name: str
    recording: Path | None
    flags: tuple[str, ...]
    world_size: int | None
    config: RunConfig | None = None


def _side(
    name: str, place: str | None, common: Sequence[str], more: Sequence[str], own: argparse.Namespace
) -> Side:
    """Return a side by what was given, checked. Raises ConfigError, CheckpointError."""
    parser = FlagParser()
    parser.add_argument("--world-size", type=positive(int), default=own.world_size)
    known, flags = parser.parse_known_args([*common, *more])
    given_flags(flags)
    if place is not None and (Path(place) / RECORDING_FILE).exists():
        if more:
            raise ConfigError(f"--{name.lower()}: {place} is a recording, which has been run: drop the flags")
        return Side(name, Path(place), (), None)
    asked_ranks = known.world_size
    if place is not None:
        flags = [*_start_flags(place, known.world_size is None), *flags]
        known, flags = parser.parse_known_args(flags, known)
    config = read_train_command(flags).config
    ranks = known.world_size
    if not asked_ranks and ranks and ranks % config.model_parallel_size:
        ranks = None  # those of the checkpoint, and flags give it another mesh
    try:
        check(config, ranks or config.model_parallel_size)
    except ConfigError as error:
        raise side_error(name, error) from None
    return Side(name, None, tuple(flags), ranks, config)


def side_error(name: str, error: NexusError) -> NexusError:
    """Return an error with the side that it is of."""
    if isinstance(error, ConfigError):
        return ConfigError([f"side {name}: {problem}" for problem in error.problems])
    return type(error)(f"side {name}: {error}")


def _recorded(side: Side, own: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of a side's recording, which is made where there is none. Raises NexusError."""
    if side.recording is not None:
        return side.recording
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--keep {folder.parent} holds {folder.name} already: give a new folder")
    words = [*program_words("compare"), "--record", str(folder), "--steps", str(own.steps)]
    words += ["--samples", str(own.samples)]
    if side.world_size:
        words += ["--world-size", str(side.world_size)]
    said = shlex.join(side.flags) or "the default preset"
    with log.Progress(f"{side.name}: recording {own.steps} steps of {said}"):
        try:
            run_program([*words, *side.flags], echo=False)
        except NexusError as error:
            raise side_error(side.name, error) from None
    return folder


def _start_flags(place: str, as_many_ranks: bool) -> list[str]:
    """Return the flags that start a run where it is, on the mesh that it had. Raises CheckpointError."""
    folder = Path(place)
    if SCHEME not in place and (folder / CONFIG_FILE).exists() and not any(folder.glob("iter_*")):
        return ["--config", str(folder / CONFIG_FILE)]
    saved = open_saved_run(location(place))
    parallel, topology = saved.config.parallel, saved.manifest.topology
    flags = ["--load", place, "--tp", str(topology.tensor_size), "--pp", str(topology.pipe_size)]
    flags += ["--zero-stage", str(parallel.zero_stage)]
    if as_many_ranks:
        flags += ["--world-size", str(topology.world_size)]
    return [*flags, "--sequence-parallel"] if parallel.sequence_parallel else flags
