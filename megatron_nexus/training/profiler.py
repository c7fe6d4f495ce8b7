"""Profiler: traces of chosen steps on chosen ranks, for --profile, and the history of CUDA's memory.

    RUN/profile/rank_0_steps_10-11.json      a Chrome trace: chrome://tracing, or https://ui.perfetto.dev
    RUN/profile/rank_0_steps_10-11.txt       where the time went, by operator

Flags and steps are Megatron-LM's: from --profile-step-start up to, not including, --profile-step-end, counted
over the whole run.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_nexus.config.profile import profile_ranks
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import raise_problems
from megatron_nexus.log import logger, show
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import StepMetrics

ROWS, COLUMN = 15, 48
"""Operators of the table, and the width of their names."""
HISTORY_ENTRIES = 100_000


def require_cuda_for_profile(config: RunConfig, device_type: str) -> None:
    """Raise ConfigError where a flag asks for something that only CUDA has."""
    logging, problems = config.logging, []
    if device_type != "cuda" and logging.record_memory_history:
        problems.append(
            "--record-memory-history records CUDA's allocator, and this run is on CPUs: drop it; --profile "
            "works here"
        )
    if device_type != "cuda" and logging.profile and not logging.use_pytorch_profiler:
        problems.append(
            "--no-use-pytorch-profiler is for nsys, which needs CUDA, and this run is on CPUs: drop it"
        )
    raise_problems(problems)


class Profiler(Hook):
    """Traces steps of a rank that is among --profile-ranks."""

    def __init__(self, config: RunConfig, mesh: Mesh, run_dir: Path, done: int) -> None:
        """`done` steps are behind the run; profiling begins at once where the next is the first of it."""
        logging = config.logging
        self._first, self._end = logging.profile_step_start, logging.profile_step_end
        self._mesh, self._run_dir = mesh, run_dir
        self._by_torch = logging.use_pytorch_profiler
        self._profile: profile | None = None
        self._is_running = False
        if done + 1 >= self._end:
            logger.info(
                f"note: --profile: steps {self._first} to {self._end - 1} are over: give "
                f"--profile-step-start {done + 1} or more"
            )
        self._done = done
        self._begin_after(done)

    def after_step(self, metrics: StepMetrics) -> None:
        self._done = metrics.step
        if metrics.step + 1 >= self._end:
            self._finish()
        self._begin_after(metrics.step)

    def on_failure(self, error: BaseException) -> None:
        self._finish()

    def on_end(self) -> None:
        """Write what there is of a run that was asked to stop."""
        self._finish()

    def _begin_after(self, step: int) -> None:
        if self._is_running or not self._first <= step + 1 < self._end:
            return
        self._is_running, self._first = True, step + 1
        if self._by_torch:
            kinds = [ProfilerActivity.CPU]
            if self._mesh.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=kinds)
            self._profile.start()
        else:
            torch.cuda.cudart().cudaProfilerStart()

    def _finish(self) -> None:
        if not self._is_running:
            return
        self._is_running = False
        if self._profile is None:
            torch.cuda.cudart().cudaProfilerStop()
            return
        self._profile.stop()
        folder = self._run_dir / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        last = max(self._first, self._done)  # a step that failed is not done
        path = folder / f"rank_{self._mesh.rank}_steps_{self._first}-{last}.json"
        self._profile.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if self._mesh.device.type == "cuda" else "self_cpu_time_total"
        table = self._profile.key_averages().table(
            sort_by=order, row_limit=ROWS, max_name_column_width=COLUMN
        )
        path.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
        show(table.splitlines())
        logger.info("wrote %s: open it at https://ui.perfetto.dev", path)
        self._profile = None


class MemoryHistory(Hook):
    """Writes CUDA's allocations with stacks, for https://pytorch.org/memory_viz. Not run on a GPU yet."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        """Begin to record."""
        self._interval = config.logging.log_interval
        self.path = snapshot_path(config, mesh.rank)
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)

    def after_step(self, metrics: StepMetrics) -> None:
        """Write the history every --log-interval steps."""
        if metrics.step % self._interval == 0:
            torch.cuda.memory._dump_snapshot(str(self.path))

    def on_failure(self, error: BaseException) -> None:
        torch.cuda.memory._dump_snapshot(str(self.path))


def snapshot_path(config: RunConfig, rank: int) -> Path:
    """Return the snapshot of a rank: snapshot_rank_0.pickle for --memory-snapshot-path snapshot.pickle."""
    given = Path(config.logging.memory_snapshot_path)
    return given.with_name(f"{given.stem}_rank_{rank}{given.suffix}")


def profiling_hooks(config: RunConfig, mesh: Mesh, run_dir: Path, done: int) -> list[Hook]:
    """Return what the flags ask for on this rank; `done` steps are behind the run."""
    logging, made = config.logging, list[Hook]()
    if mesh.rank not in profile_ranks(logging):
        return made
    if logging.profile:
        made.append(Profiler(config, mesh, run_dir, done))
    if logging.record_memory_history:
        made.append(MemoryHistory(config, mesh))
    return made
