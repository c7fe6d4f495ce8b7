"""What a run tells: its records survive a crash, a resume replaces what it repeats, the plot shows them."""

import json
import math
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus import log
from megatron_nexus.errors import TrainingError
from megatron_nexus.training.loggers import TensorBoardLogger
from megatron_nexus.training.loss_plot import LossPlot
from megatron_nexus.training.metrics import (
    METRICS_FILE,
    PLOT_FILE,
    MetricsWriter,
    StepMetrics,
    make_validation,
    plot_losses,
    read_metrics,
)
from megatron_nexus.training.throughput import device_peak

TAGS = {"lm loss", "learning-rate", "grad-norm", "tokens-per-second", "gemm-fraction", "memory-bytes"}


def step_of(step: int, loss: float = 4.0, mfu: float | None = None) -> StepMetrics:
    return StepMetrics(step, loss, 1e-3, 0.7, 64 * step, 0.5, 128.0, 0.25, mfu, 2_000_000_000)


def write(folder: Path, first: int, last: int, loss: float = 4.0, board: str = "") -> None:
    """The part of a run from step `first` to `last`, with a validation at its end."""
    writer = MetricsWriter(folder, first - 1, [TensorBoardLogger(board, first - 1)] if board else [])
    for step in range(first, last + 1):
        writer.step(step_of(step, loss), 100, speak=False)
    writer.evaluation(make_validation("validation", last, loss, 100, 300))
    writer.close()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == [1, 2, 3, 3]
    assert records[1] == {
        "step": 2,
        "loss": 4.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.7,
        "tokens": 128,
        "step_s": 0.5,
        "tokens_per_s": 128.0,
        "gemm_fraction": 0.25,
        "memory_bytes": 2_000_000_000,
    }
    assert records[3]["validation_loss"] == 4.0


def test_a_record_is_on_the_disk_before_the_run_ends(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.step(step_of(1), 100, speak=False)
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1
    writer.close()


def test_a_disk_that_takes_no_more_records_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(TrainingError, match=f"{METRICS_FILE}: File too large: free some space"):
            for step in range(1, 10):
                writer.step(step_of(step), 100, speak=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert read_metrics(tmp_path / METRICS_FILE)[0]["step"] == 1


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path: Path) -> None:
    write(tmp_path, 1, 9, loss=4.0)
    write(tmp_path, 5, 6, loss=3.0)  # from the checkpoint of step 4
    records = read_metrics(tmp_path / METRICS_FILE)
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert losses == [(1, 4.0), (2, 4.0), (3, 4.0), (4, 4.0), (5, 3.0), (6, 3.0)]
    assert [r["step"] for r in records if "validation_loss" in r] == [6]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_run_that_begins_again_measures_step_0_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 0)
    write(tmp_path, 1, 0)
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [0]


def test_what_a_crash_of_the_disk_left_behind_the_records_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo\xbd\x00\xff\n')
    write(tmp_path, 4, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("lost", [1, 10, 60])
def test_a_last_line_cut_short_by_a_crash_is_left_out(tmp_path: Path, lost: int) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.step(step_of(step), 100, speak=False)
    writer.close()
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text()[: -1 - lost])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(tmp_path, 3, 3, loss=3.5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3]


def test_there_are_no_records_before_the_first_run(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS_FILE) == []


def test_the_console_shows_the_steps_it_is_asked_to(
    tmp_path: Path, console: pytest.CaptureFixture[str]
) -> None:
    log.configure(is_main_rank=True)
    writer = MetricsWriter(tmp_path, 0)
    writer.step(step_of(6), 300, speak=False)
    writer.step(step_of(7), 300, speak=True)
    writer.step(step_of(8, mfu=0.2), 300, speak=True, left_s=8280.0)
    writer.close()
    begins = "lm loss 4.0000 | lr 1.00e-03 | grad norm 0.700 | 128 tokens/s"
    assert console.readouterr().out == (
        f"iteration   7/300 | {begins} | 25.0 % of measured GEMM | mem 2.00 GB\n"
        f"iteration   8/300 | {begins} | MFU 20.0 % | mem 2.00 GB | 2.3 h left\n"
    )
    assert [record.get("mfu") for record in read_metrics(tmp_path / METRICS_FILE)] == [None, None, 0.2]


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA Unheard Of", None),
        ("CPU", None),
    ],
)
def test_a_peak_is_told_of_whole_devices_that_are_known(device: str, peak: float | None) -> None:
    assert device_peak(device, "bf16") == peak
    assert device_peak(device, "tf32") == (peak / 2 if peak else None)


def test_perplexity_and_bits_per_byte_follow_from_the_loss() -> None:
    validation = make_validation("validation", 5, loss=2 * math.log(2), targets=300, target_bytes=1200)
    assert validation.perplexity == pytest.approx(4.0)
    # 300 tokens of 2 bits stand for 1,200 bytes.
    assert validation.bits_per_byte == pytest.approx(0.5)
    assert str(validation) == "loss 1.3863 nats/token | perplexity 4.00 | 0.500 bits per byte"


def test_bits_per_byte_are_not_guessed_without_a_tokenizer() -> None:
    validation = make_validation("validation", 5, 1.0, 300, None)
    assert validation.bits_per_byte is None
    assert "unknown without --tokenizer-model" in str(validation)


def test_a_loss_that_ran_away_still_has_a_perplexity() -> None:
    assert math.isfinite(make_validation("validation", 1, 1e6, 1, None).perplexity)


def drawn(folder: Path) -> np.ndarray:
    from matplotlib import image

    path = plot_losses(folder, 4.5, "a run")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(path)


def test_a_plot_that_cannot_be_drawn_is_logged_and_not_tried_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "validation_loss": 2.0}\n')
    log.configure(is_main_rank=True)
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    hook = LossPlot(tmp_path, 4.5, "a run")
    now += 61.0
    for _ in range(3):
        hook.after_step(step_of(20))
        hook.on_end()
    assert console.readouterr().out.count("loss.png is not drawn: KeyError: 'name'") == 1


def test_the_plot_is_drawn_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 20)
    hook = LossPlot(tmp_path, 4.5, "a run")
    hook.after_step(step_of(20))
    hook.on_end()
    assert not (tmp_path / PLOT_FILE).exists(), "not yet a minute old"
    monkeypatch.setattr("megatron_nexus.training.loss_plot.INTERVAL_S", -1.0)
    hook = LossPlot(tmp_path, 4.5, "a run")
    hook.after_step(step_of(20))
    hook.on_end()
    assert [path.name for path in tmp_path.glob("*.png")] == [PLOT_FILE]


def test_the_plot_shows_what_the_records_say(tmp_path: Path) -> None:
    write(tmp_path, 1, 20, loss=4.0)
    flat = drawn(tmp_path)
    assert flat.shape[:2] == (540, 960)
    assert 0.005 < float((flat[..., :3].mean(-1) < 0.9).mean()) < 0.5, "neither empty nor black"
    write(tmp_path, 11, 20, loss=2.0)
    assert not np.array_equal(flat, drawn(tmp_path)), "other losses, the same picture"


def test_a_run_without_a_step_has_a_plot_too(tmp_path: Path) -> None:
    write(tmp_path, 1, 0)
    assert drawn(tmp_path).shape[:2] == (540, 960)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here: half a second

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_step_under_the_field_s_own_tags(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, board=str(tmp_path / "board"))
    seen = scalars(tmp_path / "board")
    assert seen.keys() == TAGS | {"lm loss validation"}
    assert [step for step, _ in seen["lm loss"]] == [1, 2, 3]
    assert seen["learning-rate"][2] == (3, pytest.approx(1e-3))
    assert seen["lm loss validation"] == [(3, 4.0)]


def test_every_set_is_told_under_its_own_name(tmp_path: Path, console: pytest.CaptureFixture[str]) -> None:
    log.configure(is_main_rank=True)
    writer = MetricsWriter(tmp_path, 0, [TensorBoardLogger(str(tmp_path / "board"), 0)])
    for name, loss in [("validation web", 3.0), ("validation code", 2.0), ("test", 1.0)]:
        writer.evaluation(make_validation(name, 4, loss, 100, 300))
    writer.close()
    output = [line.split(" nats")[0] for line in console.readouterr().out.splitlines()]
    assert output == [
        "validation web at 4 | loss 3.0000",
        "validation code at 4 | loss 2.0000",
        "test at 4 | loss 1.0000",
    ]
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [(r["name"], r["validation_loss"]) for r in records] == [
        ("validation web", 3.0),
        ("validation code", 2.0),
        ("test", 1.0),
    ]
    assert scalars(tmp_path / "board") == {
        "lm loss validation web": [(4, 3.0)],
        "lm loss validation code": [(4, 2.0)],
        "lm loss test": [(4, 1.0)],
    }


def test_tensorboard_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    board = tmp_path / "board"
    write(tmp_path, 1, 9, loss=4.0, board=str(board))
    write(tmp_path, 5, 6, loss=3.0, board=str(board))
    expected = [(step, 4.0) for step in range(1, 5)] + [(5, 3.0), (6, 3.0)]
    assert scalars(board)["lm loss"] == expected
