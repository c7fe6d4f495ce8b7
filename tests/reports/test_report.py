"""The page of `nexus report`: its numbers are the metrics', what is missing is said, nothing is loaded."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, manifest_to_json, read_manifest
from megatron_nexus.cli.report import run
from megatron_nexus.config.config_file import CONFIG_FILE, config_text
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError, path_errors
from megatron_nexus.evaluation.loaded_model import load_model
from megatron_nexus.models.decoder import training_flops_per_token
from megatron_nexus.reports.divergence import compare
from megatron_nexus.training.metrics import (
    METRICS_FILE,
    GrowthMetrics,
    MetricsWriter,
    StepMetrics,
    make_validation,
)
from megatron_nexus.training.run_times import log_command
from tests.support import checkpoints, reference
from tests.support.waiting import wait_for

FLAGS = {"train_iters": 80, "seq_length": 25, "precision": "fp32"}
GROWN_AT = checkpoints.STEP
SIZES = {"nexus_m": 21, "nexus_a": 30}
FOREIGN = "wide & <b>deep"


def loss_at(step: int, seed: int) -> float:
    return 6.0 - 0.01 * step + 0.1 * float(np.random.default_rng([step, seed]).standard_normal())


def write_metrics(folder: Path, steps: range, seed: int, grown: bool = False) -> None:
    """What a run of these steps records: 4 samples of 25 tokens a step."""
    writer = MetricsWriter(folder, steps[0] - 1, "")
    for step in steps:
        if grown and step % 10 == 0:
            numbers = {"elements_old": 285.0, "elements_new": 114.0, "grad_ratio": 0.1 + 1e-3 * step}
            writer.evaluation(GrowthMetrics(step, 0.1, {"layers.0.attention.q.w_m": numbers}))
        metrics = StepMetrics(step, loss_at(step, seed), 1e-3, 1.0, 100 * step, 0.5, 200.0, 0.1, None, 1)
        writer.step(metrics, 80, False)
        if step % 20 == 0:
            writer.evaluation(make_validation("validation", step, loss_at(step, seed) - 0.5, 100, 400))
    writer.close()


def write_config(folder: Path, config: RunConfig) -> None:
    (folder / CONFIG_FILE).write_text(config_text(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 80 steps; grown after 40, trained to 70 of 80; grown otherwise, with a name to escape."""
    root = tmp_path_factory.mktemp("report") / "runs"
    config = checkpoints.configure(**FLAGS)
    base = checkpoints.write_checkpoint(root / "base", config)
    write_config(root / "base", config)
    write_metrics(root / "base", range(1, 81), seed=1)
    for name, sizes, last in (("grown", SIZES, 70), (FOREIGN, {"ffn_hidden_size": 23}, 80)):
        _, after = checkpoints.grow(base, root / name, config, sizes)
        write_config(root / name, after)
        write_metrics(root / name, range(GROWN_AT + 1, last + 1), seed=2, grown=True)
        log_command(root / name, ["nexus", "train", "--save", name], GROWN_AT)
    return root


class Page(HTMLParser):
    """The tables of a page, and every tag and attribute in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str | float]]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self._cell: float | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            value = dict(attrs).get("data-value")
            self.tables[-1][-1].append("" if value is None else float(value))

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.lasttag in ("td", "th") and self.tables and self.tables[-1] and self.tables[-1][-1]:
            row = self.tables[-1][-1]
            if isinstance(row[-1], str):
                row[-1] += data

    def table(self, title: str) -> list[dict[str, str | float]]:
        """The rows of the table that has a column of this title, by column."""
        (found,) = (table for table in self.tables if title in table[0])
        return [dict(zip(map(str, found[0]), row, strict=True)) for row in found[1:]]


def report(*words: str | Path, output: Path) -> Page:
    run([*map(str, words), "--output", str(output)])
    return Page(output.read_text())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_numbers_are_those_of_the_metrics(folder: Path, tmp_path: Path) -> None:
    page = report(folder, output=tmp_path / "report.html")
    rows = {str(row["run"]): row for row in page.table("parameters")}
    assert set(rows) == {"base", "grown", FOREIGN}
    written = records(folder / "grown")
    steps = [record for record in written if "loss" in record]
    grown = rows["grown"]
    assert grown["steps"] == steps[-1]["step"] == 70
    assert grown["tokens"] == steps[-1]["tokens"]
    assert grown["training loss, last 20"] == pytest.approx(mean(r["loss"] for r in steps[-20:]), rel=1e-12)
    assert grown["hours, own"] == pytest.approx(sum(r["step_s"] for r in steps) / 3600, rel=1e-12)
    validations = {r["step"]: r["validation_loss"] for r in written if "validation_loss" in r}
    assert grown["validation loss"] == validations[60]
    manifest = read_manifest(next((folder / "grown").glob("iter_*")))
    model, entry = RunConfig.from_dict(manifest.config).model, manifest.lineage[-1]
    per_token = training_flops_per_token(model, 25)
    assert grown["FLOPs"] == entry["flops"] + per_token * (steps[-1]["tokens"] - entry["tokens"])
    growth = next(row for row in page.table("grown at step") if row["run"] == "grown")
    base = {r["step"]: r["loss"] for r in records(folder / "base") if "loss" in r}
    assert growth["grown at step"] == GROWN_AT
    assert growth["first loss after"] == steps[0]["loss"]
    assert growth["parent's loss of that step"] == base[GROWN_AT + 1]
    assert growth["loss before, 20 steps"] == pytest.approx(mean(base[s] for s in range(21, 41)), rel=1e-12)
    theirs = {r["step"]: r["validation_loss"] for r in records(folder / "base") if "validation_loss" in r}
    gap = next(row for row in page.table("gap at equal tokens") if row["run"] == "grown")
    assert gap["gap at equal tokens"] == validations[60] - theirs[60]
    # The last record of each grown run, the tensor by its own name.
    tables = [t for t in page.tables if t[0][0] == "tensor"]
    assert len(tables) == 2
    last = [r for r in written if "growth_metrics" in r][-1]["growth_metrics"]
    (numbers,) = last.values()
    assert tables[1][1] == [*last, *numbers.values()] or tables[0][1] == [*last, *numbers.values()]


def test_a_page_loads_nothing_and_escapes_what_runs_say(folder: Path, tmp_path: Path) -> None:
    page = report(folder, output=tmp_path / "report.html")
    assert not page.tags & {"script", "link", "img", "iframe", "b", "object", "embed"}
    assert not page.attributes & {"src", "href", "onload", "xlink:href"}
    assert FOREIGN in page.words
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    assert f"nexus train --save '{FOREIGN}'" in page.words


def test_what_is_missing_is_said_in_the_page(folder: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(folder, tmp_path / "runs")
    path = runs / "grown" / METRICS_FILE
    path.write_text(path.read_text()[:-30])  # killed while it wrote
    (runs / "base" / CONFIG_FILE).write_text("model: [")
    manifest = next((runs / FOREIGN).glob("iter_*")) / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace("lineage", "lineagf"))
    (runs / "new").mkdir()
    (runs / "new" / METRICS_FILE).write_text("")
    shutil.copytree(runs / "grown", runs / "unlearned")
    origin = {"unlearning": {}, "parent": "grown/iter_0000080", "parent_step": 80}
    for checkpoint in (runs / "unlearned").glob("iter_*"):
        entries = read_manifest(checkpoint)
        changed = dataclasses.replace(entries, lineage=[*entries.lineage, origin])
        (checkpoint / MANIFEST_FILE).write_text(manifest_to_json(changed))
    page = report(runs, output=tmp_path / "report.html")
    lines = len(path.read_bytes().splitlines())
    assert f"grown: 1 of {lines} lines" in page.words
    assert "grown: unfinished: step 69 of 80" in page.words
    assert "base: config.yaml cannot be read" in page.words
    assert f"{FOREIGN}: its checkpoints cannot be read" in page.words
    assert "new: no step is recorded" in page.words
    assert "unlearned: it unlearns, from the weights of grown/iter_0000080" in page.words
    assert "unlearned: its parent" not in page.words and "grown: its parent" not in page.words


@pytest.mark.slow
def test_a_page_follows_a_run_until_it_has_finished(folder: Path, tmp_path: Path) -> None:
    root, output = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(folder / "base", root)
    lines = (root / METRICS_FILE).read_text().splitlines(keepends=True)
    (root / METRICS_FILE).write_text("".join(lines[:30]))
    words = [str(root), "--output", str(output), "--every", "1"]
    follower = threading.Thread(target=run, args=[words], daemon=True)
    follower.start()
    wait_for(output.exists, "the first page")
    first = Page(output.read_text())
    assert "http-equiv" in first.attributes and first.table("parameters")[0]["steps"] < 30
    (root / METRICS_FILE).write_text("".join(lines))
    follower.join(20)
    assert not follower.is_alive(), "the run has finished"
    last = Page(output.read_text())
    assert "http-equiv" not in last.attributes and last.table("parameters")[0]["steps"] == 80
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["{0}/none"], ("{0}/none", METRICS_FILE, "give")),
        (["{0}"], ("{0}", METRICS_FILE, "give")),
        (["{1}/base", "{1}/base"], ("base", "twice", "once")),
        (["{1}", "{1}/base"], ("base", "twice", "once")),
        (["{1}/base", "--output", "{0}"], ("--output {0}", "give")),
        (["{1}/base", "--output", "{0}/a.png"], ("--output {0}/a.png", "report.html")),
        (["{1}/base", "--held-out", "{0}/none"], ("--held-out {0}/none", "give")),
        (["{1}/base", "--held-out", "{2}"], ("--held-out", "none of the runs has grown")),
        (["{1}/grown", "--held-out", "{2}"], ("--tokenizer-model",)),
        (["{1}/grown", "--held-out", "{2}", "--every", "5"], ("--held-out {2}", "without --every")),
        (["{1}/base", "--tokenizer-model", "{2}"], ("--tokenizer-model {2}", "--held-out")),
    ],
)
def test_bad_input_is_one_error_and_no_page(
    words: list[str], named: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("held out")
    given = [word.format(empty, folder, text) for word in words]
    if "--output" not in words:
        given += ["--output", str(tmp_path / "report.html")]
    monkeypatch.setattr(sys, "argv", ["nexus", "report", *given])
    with pytest.raises(Exception) as raised, path_errors():
        run(given)
    assert type(raised.value).__module__ == ConfigError.__module__
    for part in named:
        assert part.format(empty, folder, text) in str(raised.value)
    assert not [*tmp_path.rglob("*.html")]


def test_divergence_is_that_of_whole_distributions(folder: Path) -> None:
    """0 of a growth that keeps the function; else as the equations have it, in float64."""
    base, grown = (next((folder / name).glob("iter_*")) for name in ("base", "grown"))
    models = []
    for path in (base, grown):
        config = RunConfig.from_dict(read_manifest(path).config)
        models.append(load_model(path, config.model, 25, torch.device("cpu"), torch.float64))
    vocabulary = models[0].model.vocab_size
    rows = torch.randint(0, vocabulary, (3, 10), generator=torch.Generator().manual_seed(5)).tolist()
    same = compare("grown", "grown", models[0], models[1], rows)
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.loss == pytest.approx(same.parent_loss, abs=1e-6)
    other = checkpoints.write_checkpoint(folder.parent / "other", checkpoints.configure(**FLAGS), seed=11)
    child = load_model(other, models[0].model, 25, torch.device("cpu"), torch.float64)
    found = compare("grown", "grown", models[0], child, rows)
    ids = torch.tensor(rows)
    config = read_manifest(base).config["model"]
    p, q = (
        reference.logits(checkpoints.weights(path), ids[:, :-1], config).log_softmax(-1)
        for path in (base, other)
    )
    per_row = (p.exp() * (p - q)).sum(-1).mean(1)
    assert found.kl == pytest.approx(float(per_row.mean()), rel=1e-5) and found.kl > 1e-3
    assert found.kl_error == pytest.approx(float(per_row.std()) / 3**0.5, rel=1e-4)
    assert found.loss == pytest.approx(float(-q.gather(-1, ids[:, 1:, None]).mean()), rel=1e-5)
    assert (found.step, found.tokens) == (GROWN_AT, 27)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
@pytest.mark.parametrize("width", [500, 1280])
def test_no_width_of_the_page_needs_to_scroll_sideways(width: int, folder: Path, tmp_path: Path) -> None:
    report(folder, output=tmp_path / "report.html")
    page = tmp_path / "measured.html"
    measure = (
        "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    )
    page.write_text((tmp_path / "report.html").read_text().replace("</body>", measure))
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found is not None
    assert int(found[1]) <= int(found[2])
