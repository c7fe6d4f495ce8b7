"""Loggers: where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow. On rank 0.

A run that is resumed in its --save folder goes on under the identifiers that it has in LOGGED_RUNS_FILE.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_nexus.base.durable import atomic_file
from megatron_nexus.base.json_text import parse_json
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError, os_errors_as
from megatron_nexus.extras import install_command
from megatron_nexus.log import logger

LOGGED_RUNS_FILE = "logged_runs.json"
"""In the run's folder: the run's identifier by the name of the service."""


class Logger(Protocol):
    """Takes a run's numbers, as TensorBoard, Weights & Biases and MLflow do."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step by their tags, such as "lm loss"."""

    def finish(self, failed: bool) -> None:
        """Write what is held back, and end."""


class TensorBoardLogger:
    """Writes event files to --tensorboard-dir; steps that a resumed run repeats replace the old ones."""

    def __init__(self, folder: str, resumed_step: int) -> None:
        """Raises ConfigError where TensorBoard is not installed or the folder cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # optional: an extra of the package
        except ImportError as error:
            raise _missing(f"--tensorboard-dir {folder}", "tensorboard") from error
        with os_errors_as(ConfigError, f"--tensorboard-dir {folder}", "give a writable folder"):
            # A process that is killed loses what it has not flushed: torch's own 120 s are many steps.
            self._writer = SummaryWriter(folder, purge_step=resumed_step + 1, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class WandbLogger:
    """Logs to a project of Weights & Biases; WANDB_MODE=offline keeps all of it on disk for `wandb sync`."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Begin the run, or go on with the one of this folder. Raises ConfigError where that fails."""
        logging = config.logging
        given = f"--wandb-project {logging.wandb_project}"
        try:
            import wandb  # optional: an extra of the package
        except ImportError as error:
            raise _missing(given, "wandb") from error
        runs = _read_runs(run_dir)
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name or None,
                entity=logging.wandb_entity or None,
                dir=logging.wandb_save_dir or str(run_dir),
                config=asdict(config),
                id=runs.get("wandb"),
                resume="allow",
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"{given}: {error}: run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            ) from error
        _write_runs(run_dir, {**runs, "wandb": self._run.id})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        """Upload or write what is held back; mark the run as failed or finished."""
        self._run.finish(exit_code=1 if failed else 0)


class MLflowLogger:
    """Logs to an experiment of MLflow at --mlflow-tracking-uri, MLFLOW_TRACKING_URI where it is empty."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Begin the run, or go on with the one of this folder. Raises ConfigError where that fails."""
        logging = config.logging
        given = f"--mlflow-experiment {logging.mlflow_experiment}"
        try:
            from mlflow import MlflowClient  # optional: an extra of the package
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise _missing(given, "mlflow") from error
        self._metric: Callable[[str, float, int, int], Any] = Metric
        self._error: type[Exception] = MlflowException
        # What may be under way: MLflow sends in order, by a few threads.
        self._sent: deque[Any] = deque(maxlen=1000)
        runs = _read_runs(run_dir)
        # By default MLflow tries a server that is not there for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        uri = logging.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        try:
            self._client = MlflowClient(tracking_uri=uri or None)
            if "mlflow" in runs:
                self._run = self._client.get_run(runs["mlflow"]).info.run_id
                self._client.update_run(self._run, status="RUNNING")
                return
            experiment = self._client.get_experiment_by_name(logging.mlflow_experiment)
            number = (
                experiment.experiment_id
                if experiment is not None
                else self._client.create_experiment(logging.mlflow_experiment)
            )
            made = self._client.create_run(number, run_name=logging.mlflow_run_name or None)
            self._run = made.info.run_id
            settings = [Param(name, value) for name, value in _flat(asdict(config)).items()]
            for first in range(0, len(settings), 100):  # MLflow's limit for one request
                self._client.log_batch(self._run, params=settings[first : first + 100])
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"{given}, --mlflow-tracking-uri {uri or '(not given)'}: {str(error).splitlines()[0]}: "
                "give the http address of a server, or sqlite:///FILE with all of the package mlflow"
            ) from error
        _write_runs(run_dir, {**runs, "mlflow": self._run})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step, without waiting for the server."""
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(tag, value, now_ms, step) for tag, value in values.items()]
        self._sent.append(self._client.log_batch(self._run, metrics=metrics, synchronous=False))

    def finish(self, failed: bool) -> None:
        """Wait for the server to have all; mark the run as failed or finished."""
        try:
            for sent in self._sent:
                sent.wait()
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
        except self._error as error:  # a lost server costs the run nothing
            logger.warning("MLflow: %s; metrics.jsonl has all numbers", str(error).splitlines()[0])


class DeepSpeedLogger:
    """Logs to the monitors of --deepspeed-config, which DeepSpeed itself gives the learning rate alone."""

    def __init__(self, write: Callable[[Mapping[str, float]], None]) -> None:
        """`write` hands values to the engine's monitors."""
        self._write = write

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._write(values)

    def finish(self, failed: bool) -> None:
        """Do nothing: the monitors end with the process."""


def open_loggers(
    config: RunConfig,
    run_dir: Path,
    resumed_step: int,
    write_monitors: Callable[[Mapping[str, float]], None] | None = None,
) -> list[Logger]:
    """Return the loggers that the flags ask for, and DeepSpeed's monitors where `write_monitors` is given.

    Raises ConfigError where one cannot begin.
    """
    logging = config.logging
    made: list[Logger] = [DeepSpeedLogger(write_monitors)] if write_monitors else []
    if logging.tensorboard_dir:
        made.append(TensorBoardLogger(logging.tensorboard_dir, resumed_step))
    if logging.wandb_project:
        made.append(WandbLogger(config, run_dir))
    if logging.mlflow_experiment:
        made.append(MLflowLogger(config, run_dir))
    return made


def _missing(given: str, extra: str) -> ConfigError:
    return ConfigError(f"{given} needs {extra}: {install_command(extra)}")


def _read_runs(run_dir: Path) -> dict[str, str]:
    path = run_dir / LOGGED_RUNS_FILE
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): remove it to begin new logged runs") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"{path} holds no identifiers of runs: remove it to begin new logged runs")
    return found


def _write_runs(run_dir: Path, runs: Mapping[str, str]) -> None:
    with atomic_file(run_dir / LOGGED_RUNS_FILE) as write:
        write(json.dumps(runs, indent=1).encode())


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested settings as "optimizer.lr" and the like."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = str(value)
    return found
