"""Weights & Biases and MLflow: their own records on disk hold what a run says, and one run is one run."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_nexus.config.command_line import build
from megatron_nexus.errors import ConfigError, TrainingError
from megatron_nexus.parallel.beacon import Beacon
from megatron_nexus.training.hooks import Hook, telling_of_failures
from megatron_nexus.training.loggers import LOGGED_RUNS_FILE, open_loggers
from megatron_nexus.training.recorder import MetricsRecorder
from megatron_nexus.training.torch_errors import explaining_memory_errors

FLAGS = {
    "wandb": {"wandb_project": "growth", "wandb_exp_name": "first"},
    "mlflow": {"mlflow_experiment": "growth", "mlflow_run_name": "first"},
    "tensorboard": {"tensorboard_dir": "board"},
}

LEVELDB_BLOCK = 1 << 15


def import_mlflow() -> ModuleType:
    """MLflow, which conftest hides."""
    if sys.modules["mlflow"] is None:
        del sys.modules["mlflow"]
    return pytest.importorskip("mlflow")


def log(flags: dict[str, str], run_dir: Path, first: int, last: int, failed: bool = False) -> None:
    """The part of a run from step `first` to `last`."""
    [logger] = open_loggers(build(flags), run_dir, first - 1)
    for step in range(first, last + 1):
        logger.log(step, {"lm loss": 10.0 - step, "learning-rate": 0.5})
    logger.log(last, {"lm loss validation": 3.0})
    logger.finish(failed)


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which Weights & Biases' files are after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        room = LEVELDB_BLOCK - at % LEVELDB_BLOCK
        if room < 7:  # the rest of a block is too short for a header
            at += room
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_weights_and_biases_keeps_one_run_over_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(FLAGS["wandb"], tmp_path, 1, 2)
    log(FLAGS["wandb"], tmp_path, 3, 4, failed=True)
    wandb.teardown()  # its process writes the last records, as at the end of a run's process
    identifier = json.loads((tmp_path / LOGGED_RUNS_FILE).read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identifier}/run-{identifier}.wandb"))
    assert len(files) == 2
    seen: dict[int, dict[str, float]] = {}
    configs, codes = [], []
    for file in files:
        for found in leveldb_records(file.read_bytes()):
            record = Record.FromString(found)
            if record.HasField("history"):
                items = {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
                seen.setdefault(items["_step"], {}).update(items)
            if record.HasField("run"):
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            if record.HasField("exit"):
                codes.append(record.exit.exit_code)
    assert {step: items["lm loss"] for step, items in seen.items()} == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert seen[4]["lm loss validation"] == 3.0
    assert configs[0]["optimizer"]["lr"] == build({}).optimizer.lr
    assert codes == [0, 1]


@pytest.mark.slow
def test_mlflow_keeps_one_run_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = import_mlflow()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    uri = (tmp_path / "mlruns").as_uri()
    flags = {**FLAGS["mlflow"], "mlflow_tracking_uri": uri}
    log(flags, tmp_path, 1, 2)
    log(flags, tmp_path, 3, 4, failed=True)
    client = mlflow.MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("growth").experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FAILED"
    assert run.data.params["optimizer.lr"] == str(build({}).optimizer.lr)
    history = client.get_metric_history(run.info.run_id, "lm loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    assert run.data.metrics["lm loss validation"] == 3.0


class FailingHook(Hook):
    """Cannot write what it has, as on a full disk."""

    def on_failure(self, error: BaseException) -> None:
        raise OSError(f"cannot write after: {error}")


class NotedHook(Hook):
    """Keeps the error that it receives."""

    error: BaseException | None = None

    def on_failure(self, error: BaseException) -> None:
        self.error = error


def test_a_hook_that_fails_hides_neither_the_error_of_the_run_nor_the_run_from_other_hooks() -> None:
    noted = NotedHook()
    with (
        pytest.raises(TrainingError, match="not finite"),
        telling_of_failures([FailingHook(), noted], Beacon()),
    ):
        raise TrainingError("the loss is not finite")
    assert isinstance(noted.error, TrainingError)


@pytest.mark.slow
def test_a_run_whose_memory_runs_out_has_failed_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = import_mlflow()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    config = build({**FLAGS["mlflow"], "mlflow_tracking_uri": uri})
    hooks: list[Hook] = []
    with (
        pytest.raises(TrainingError, match="out of memory"),
        telling_of_failures(hooks, Beacon()),
        explaining_memory_errors(config, 0, 1, torch.device("cpu"), Beacon()),
    ):
        hooks.append(MetricsRecorder(config, True, tmp_path, 0, 100))
        torch.empty(2**50)
    client = mlflow.MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("growth").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_not_installed_is_a_wrong_flag(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    flag, value = next(iter(FLAGS[name].items()))
    named = f"--{flag.replace('_', '-')} {value} needs {name}: pip install"
    with pytest.raises(ConfigError, match=named):
        open_loggers(build(FLAGS[name]), tmp_path, 0)


@pytest.mark.slow  # the import of wandb
def test_a_damaged_record_of_runs_is_named(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / LOGGED_RUNS_FILE).write_text("{")
    with pytest.raises(ConfigError, match=LOGGED_RUNS_FILE):
        open_loggers(build(FLAGS["wandb"]), tmp_path, 0)
