"""The loop: take a step, log, validate, save; until the last step or a signal to stop."""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import DataRecord, GrownRegion, JsonObject, Manifest, RunProgress
from megatron_nexus.checkpoint.resume import load_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.checkpoint.writer import SaveRequest
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import learning_rate
from megatron_nexus.data.prefetcher import Prefetcher
from megatron_nexus.log import logger, show
from megatron_nexus.models.decoder import training_flops_per_token
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.continuation import (
    begin_unlearning,
    continue_optimizer,
    continued_data,
    rewound_data,
)
from megatron_nexus.training.corpus import Corpus
from megatron_nexus.training.engine import Engine, StepResult
from megatron_nexus.training.evaluations import Evaluations
from megatron_nexus.training.fault_injection import FaultInjector
from megatron_nexus.training.faults import FiniteCheckpoints, StopRequest, is_finite, non_finite_error
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.machine import PeakMemory
from megatron_nexus.training.metrics import AnswerScores, StepMetrics, TaskScores, Validation
from megatron_nexus.training.optimizer import configure_groups
from megatron_nexus.training.profiler import profiling_hooks
from megatron_nexus.training.rank_batches import Batch, prefetched_batches, rank_batches
from megatron_nexus.training.recorder import MetricsRecorder
from megatron_nexus.training.replica_check import diverged_error, diverged_ranks
from megatron_nexus.training.run_checkpoints import RunCheckpoints
from megatron_nexus.training.run_times import RunTimes
from megatron_nexus.training.scoring import TaskEvaluator
from megatron_nexus.training.spike_policy import SpikePolicy
from megatron_nexus.training.step_times import StepTimes
from megatron_nexus.training.throughput import Throughput


@dataclass(frozen=True)
class RunResult:
    """What a run has reached, besides its progress and its checkpoints, which the trainer knows."""

    evaluations: tuple[Validation | AnswerScores, ...]
    """The last of each set; none where the run was stopped."""
    task_scores: TaskScores | None
    """The last, on rank 0; None where there are no tasks, or the run was stopped."""
    tokens_per_s: float


class Trainer:
    """A run's state between two steps: the engine, how far it has come, where it logs and saves."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        engine: Engine,
        corpus: Corpus,
        save: Location,
        run_dir: Path,
        gemm_flops_per_s: float,
        evaluator: TaskEvaluator | None = None,
        beacon: Beacon | None = None,
        times: RunTimes | None = None,
        hooks: list[Hook] | None = None,
    ) -> None:
        """`evaluator`, on rank 0 where there are tasks, asks for scores; `beacon` shows where a rank is.

        The trainer's own hooks are added to `hooks`.
        """
        self.config = config
        self.mesh = mesh
        self.engine = engine
        self.corpus = corpus
        self.run_dir = run_dir
        self._sample_tokens = corpus.sample_tokens(config)
        self.flops_per_token = training_flops_per_token(config.model, self._sample_tokens)
        self.throughput = Throughput(config, mesh, self.flops_per_token, gemm_flops_per_s)
        self._batch_schedule = config.batches
        self.progress = RunProgress(step=0, samples=0, tokens=0, flops=0)
        self.data = DataRecord(corpus.fingerprint, corpus.description)
        self.lineage: Sequence[JsonObject] = ()
        self.grown_regions: Sequence[GrownRegion] = ()
        self._finite = FiniteCheckpoints()
        policy = config.training.spike_policy
        self._spikes = SpikePolicy(config.training, engine, mesh) if policy != "none" else None
        self._rewinds = 0
        self._open_state: tuple[Location | None, Callable[[Location], StateReader]] = (None, CheckpointReader)
        self._batches_left: Prefetcher[Batch] = Prefetcher(iter(()))
        self._beacon = beacon or Beacon()
        self._memory = PeakMemory(mesh, config.logging.log_interval, self._beacon)
        self.injector: FaultInjector | None = None
        self.times = times or RunTimes(run_dir, writes=False)
        self.hooks: list[Hook] = [] if hooks is None else hooks
        self.hooks += [self._finite, self.times]
        self._evaluations = Evaluations(config, mesh, engine, corpus, evaluator, self.hooks)
        self.checkpoints = RunCheckpoints(
            config.checkpoint, save, engine.state, mesh, self._beacon, self.times, self.hooks
        )

    def resume(
        self,
        checkpoint: Location,
        open_state: Callable[[Location], StateReader],
        begins: bool = False,
    ) -> Manifest:
        """Continue from a checkpoint, which `open_state` reads; a collective call.

        If an unlearning run `begins`, it has the weights of the checkpoint, and nothing else of it. Raises
        CheckpointError.
        """
        manifest = self._load(checkpoint, open_state)
        if begins:
            self.lineage = begin_unlearning(self.engine.state, checkpoint, manifest, self.config, self.data)
            self.checkpoints.complete(0, checkpoint)
            return manifest
        self.grown_regions = continue_optimizer(self.engine.state, manifest, self.config)
        self.lineage = manifest.lineage
        self.progress = manifest.progress
        self.data = continued_data(self.data, manifest, self.config)
        self._open_state = checkpoint, open_state
        self.checkpoints.complete(self.progress.step, checkpoint)
        return manifest

    def _load(self, checkpoint: Location, open_state: Callable[[Location], StateReader]) -> Manifest:
        """Put a checkpoint into the engine, under this run's hyper-parameters; a collective call."""
        on_chunk = partial(self._beacon.goes_on, Phase.STARTING)
        manifest = load_checkpoint(checkpoint, self.engine.state, self.mesh, open_state, on_chunk)
        configure_groups(self.engine.optimizer.param_groups, self.config.optimizer)
        return manifest

    def fit(self, stop: StopRequest) -> RunResult:
        """Train up to `train_iters` optimizer steps and validate; saves at intervals and at the end.

        Raises TrainingError: a loss or a gradient is not finite.
        """
        try:
            return self._fit(stop)
        finally:
            self._batches_left.close()

    def _fit(self, stop: StopRequest) -> RunResult:
        config, interval = self.config, self.config.checkpoint.save_interval
        last, started = config.training.train_iters, self.progress
        last_sample = started.samples + self._batch_schedule.samples(started.samples, last - started.step)
        self._begin(last_sample)
        trained_s, stopping = 0.0, False
        evaluations: list[Validation | AnswerScores] = []
        task_scores: TaskScores | None = None
        while self.progress.step < last and not stopping:
            step = self.progress.step + 1
            if config.training.manual_gc and step % config.training.manual_gc_interval == 0:
                gc.collect()
            step_s, (stopping, saving) = self._train_step(
                step, last_sample, lambda: (stop.is_asked, self.checkpoints.is_writing)
            )
            trained_s += step_s
            if self.progress.step < step:  # rewound
                continue
            if step == started.step + 1:
                self._wait_for_steps()
            evaluations = []
            if (found := self._evaluate(step)) is not None:  # which may have taken longer than a step
                evaluations, stopping = found, self.mesh.control.any(stop.is_asked)
            if not saving:
                self.checkpoints.settle()
            if interval and step % interval == 0 and step != last and not stopping:
                self.save(async_save=config.checkpoint.async_save)
        if stopping:
            logger.info("%s: saving a checkpoint and exiting", stop.acknowledge())
        self.checkpoints.finish()
        if not self._continues_own_run or trained_s:
            self.save()
        # A run that was asked to stop leaves at once; its next part validates.
        if not stopping:
            with self._evaluating():
                evaluations = evaluations or self._evaluations.losses("validation", self.progress.step)
                evaluations += self._evaluations.losses("test", self.progress.step)
                task_scores = self._evaluations.task_scores(self.progress.step)
        for hook in self.hooks:
            hook.on_end()
        trained_tokens = self.progress.tokens - started.tokens
        tokens_per_s = trained_tokens / trained_s if trained_s else 0.0
        return RunResult(tuple(evaluations), task_scores, tokens_per_s)

    def _begin(self, last_sample: int) -> None:
        """Open the logs, begin to read the samples up to `last_sample`, and record that training begins."""
        config, mesh, started = self.config, self.mesh, self.progress
        last_tokens = started.tokens + (last_sample - started.samples) * self._sample_tokens
        recorder = MetricsRecorder(
            config, mesh.rank == 0, self.run_dir, started.step, last_tokens, self.engine.write_monitors
        )
        self.hooks += [recorder, StepTimes(config, mesh, self._beacon, self.hooks)]
        self.hooks += profiling_hooks(config, mesh, self.run_dir, started.step)
        show(self.corpus.epochs(last_sample - self.data.first_sample))
        self._read_ahead()
        if self._spikes:
            self._spikes.remember(self.run_dir, started.step)
            if self._continues_own_run:
                self._finite.remember(mesh.control, self.checkpoints.folder, self.run_dir, started.step)
        if config.unlearning.is_on and started.step == 0:
            with self._evaluating():
                self._evaluations.losses("validation", 0)
        if config.training.manual_gc:
            gc.disable()
        self.times.begin_training()

    @property
    def _continues_own_run(self) -> bool:
        """Whether the newest checkpoint lies where this run saves."""
        newest = self.checkpoints.newest
        return newest is not None and newest.parent == self.checkpoints.folder

    def _evaluate(self, step: int) -> list[Validation | AnswerScores] | None:
        """Return the losses after a step where any evaluation is due, else None; a collective call."""
        logging, last = self.config.logging, self.config.training.train_iters
        validates = logging.eval_interval and step % logging.eval_interval == 0
        scores = step != last and logging.eval_tasks_interval and step % logging.eval_tasks_interval == 0
        if not validates and not scores:
            return None
        with self._evaluating():
            found = self._evaluations.losses("validation", step) if validates else []
            if scores:
                self._evaluations.task_scores(step)
        self._wait_for_steps()
        return found

    def _wait_for_steps(self) -> None:
        """From here on a rank waits for others as long as a step may take; a collective call."""
        if timeout_s := self.config.parallel.distributed_timeout_seconds_after_init:
            self.mesh.set_timeout(timeout_s)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Wait for others as long as at the start: evaluations compile too, and ranks meet late in them."""
        self._beacon.mark(Phase.EVALUATION)
        parallel = self.config.parallel
        if parallel.distributed_timeout_seconds_after_init:
            self.mesh.set_timeout(60.0 * parallel.distributed_timeout_minutes)
        with self.times.span("evaluation"):
            yield

    def _train_step(
        self, step: int, last_sample: int, flags: Callable[[], Sequence[bool]]
    ) -> tuple[float, tuple[bool, ...]]:
        """Take a step; return its seconds, and which flags are set on any rank. Raises TrainingError."""
        optimizer, done = self.config.optimizer, self.progress
        batch = self._batch_schedule.size(done.samples)
        tokens = batch * self._sample_tokens
        self.engine.set_batch_size(batch)
        if (past := self.data.past_left_out(done.samples)) != self.data:
            self.data = past
            self._read_ahead()
        last = self.config.training.train_iters
        when = (done.samples + batch, last_sample) if optimizer.counts_samples else (step, last)
        rate = learning_rate(optimizer, *when)
        began = time.perf_counter()
        with self._beacon.in_step(step):
            if self.injector:
                self.injector.before_step(step)
            self._check_replicas(step)
            result = self._update(step, rate, flags)
        step_s = time.perf_counter() - began
        if not result.was_made and self.config.training.spike_policy == "rewind":
            self.times.add("lost", step_s)
            with self.times.span("lost"):
                self._rewind(step, batch, result)
            return step_s, result.flags
        self.progress = RunProgress(
            step, done.samples + batch, done.tokens + tokens, done.flops + tokens * self.flops_per_token
        )
        tokens_per_s = tokens / step_s
        metrics = StepMetrics(
            step=step,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=self.progress.tokens,
            step_s=step_s,
            tokens_per_s=tokens_per_s,
            gemm_fraction=self.throughput.gemm_fraction(tokens_per_s),
            mfu=self.throughput.mfu(tokens_per_s),
            memory_bytes=self._memory.bytes_after(step),
            skipped=None if result.was_made else True,
            time=round(time.time(), 3),
        )
        for hook in self.hooks:
            hook.after_step(metrics)
        return step_s, result.flags

    def _update(self, step: int, rate: float, flags: Callable[[], Sequence[bool]]) -> StepResult:
        """Compute gradients and update the weights, or not, as --spike-policy says. Raises TrainingError."""
        if self._spikes is None:
            result = self.engine.train_step(self._batches_left, rate, flags)
            ends = not is_finite(result)
        else:
            result = self._spikes.take(step, self._batches_left, self.training_batches, rate, flags)
            ends = not result.was_made and self._spikes.ends(self._rewinds)
        if not ends:
            return result
        self.checkpoints.finish()
        if self._spikes and is_finite(result):
            raise self._spikes.error(step, self._finite.way_back())
        # The weights are still those before this step, so the same samples show where it broke.
        found = self.engine.diagnose(self.training_batches())
        raise non_finite_error(self.mesh, step, result, found, self._finite.way_back())

    def _rewind(self, step: int, batch: int, result: StepResult) -> None:
        """Leave out a step's samples, from the last good checkpoint on. Raises TrainingError without one."""
        assert self._spikes is not None, "only its policy rewinds"
        self.checkpoints.finish()
        good, (opened, open_state) = self._finite.last_good(), self._open_state
        if good is None:
            raise self._spikes.error(step, self._finite.way_back())
        left_out = (self.progress.samples - self.data.first_sample, batch)
        manifest = self._load(good, open_state if good == opened else CheckpointReader)
        self.progress, self.data = manifest.progress, rewound_data(self.data, manifest, left_out)
        if good == opened and self.config.checkpoint.reset_optimizer:  # as when it was loaded first
            self.engine.state.forget_moments()
        self._rewinds += 1
        self._read_ahead()
        logger.info("rewound from step %d to %s: %d samples of that step are left out", step, good, batch)
        spike = [result.loss, result.grad_norm]
        record = {"rewound_from": step, "left_out_samples": left_out, "spike": spike}
        for hook in self.hooks:
            hook.after_rewind(self.progress.step, record)
        self._spikes.remember(self.run_dir, self.progress.step)

    def _check_replicas(self, step: int) -> None:
        """Compare what ranks hold alike, every so often; a collective call. Raises RestartError."""
        interval = self.config.training.check_weight_hash_across_dp_replicas_interval
        if interval and step % interval == 0 and (found := diverged_ranks(self.engine, self.mesh)):
            self.checkpoints.finish()
            raise diverged_error(step, found)

    def save(self, async_save: bool = False) -> None:
        """Write a checkpoint, in the background with `async_save`; a collective call.

        Raises CheckpointError where this save or the one before it failed.
        """
        request = SaveRequest(
            self.progress,
            dataclasses.asdict(self.config),
            self.corpus.tokenizer_fingerprint,
            self.lineage,
            self.data,
            self.grown_regions,
            self.corpus.prepend_bos,
        )
        self.checkpoints.save(request, async_save)

    def training_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches from where the run is."""
        return rank_batches(self.config, self.mesh, self.corpus.training, self._consumed_samples)

    def _read_ahead(self) -> None:
        """Have the steps from here on take their micro-batches from a thread that reads them ahead."""
        self._batches_left.close()
        self._batches_left = prefetched_batches(
            self.config, self.mesh, self.corpus.training, self._consumed_samples
        )

    @property
    def _consumed_samples(self) -> int:
        return self.progress.samples - self.data.first_sample
