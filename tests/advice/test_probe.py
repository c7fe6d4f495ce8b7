"""Recipes as the code has them, and a probe of them by real training."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest

from megatron_nexus import api
from megatron_nexus.advice.recipes import recipes
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.cli.advise import run
from megatron_nexus.growth.request import read_request
from megatron_nexus.spec.growth_rule import Init
from tests.support import checkpoints
from tests.support.cli import Command, commands


@pytest.fixture
def command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    yield from commands(tmp_path, tmp_path_factory.mktemp("logs"))


def test_recipes_are_all_choices_of_the_code_that_make_a_difference(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, checkpoints.configure())
    saved = open_saved_run(tmp_path)
    widths = {r.name for r in recipes(saved, read_request("nexus_m=29 nexus_a=37"))}
    inits = {f"init={init}" for init in get_args(Init) if init not in ("zero", "in_rand")}
    assert inits | {"as asked for", "moments=reset"} <= widths  # in_rand is what was asked for
    assert not any("depth" in name for name in widths)  # which no width depends on
    depth = {r.name for r in recipes(saved, read_request("num_layers=4"))}
    # What does nothing alone is tried with what it needs: another place with layers that are not stacked.
    assert {"depth_init=copy", "depth_init=copy depth_placement=end", "moments=kept"} <= depth
    assert "depth_placement=end" not in depth
    asked = recipes(saved, read_request("num_layers=4 depth_init=copy"))[0]
    assert (asked.name, asked.settings.depth_init) == ("as asked for", "copy")
    # With an inner norm in_rand is refused, and so not tried.
    config = checkpoints.configure(nexus_inner_norm=True)
    checkpoints.write_checkpoint(tmp_path / "norm", config)
    normed = recipes(dataclasses.replace(saved, config=config), read_request("nexus_m=30"))
    assert "init=in_rand" not in {r.name for r in normed}


@pytest.mark.slow
def test_a_probe_trains_each_recipe_on_the_batches_that_the_run_reads_next(
    command: Command, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(command.folder)
    code, output = command.run(
        "--save base --train-iters 40 --save-interval 32 --lr-decay-style WSD --lr-wsd-decay-iters 4 --fp32"
    )
    assert code == 0, output
    seen: list[tuple[dict[int, float], Mapping[str, object]]] = []

    def train(save: Path, echo: bool, **settings: object) -> None:
        """As api.train does, in a process that has done its imports."""
        flags = [w for name, v in settings.items() for w in (f"--{name.replace('_', '-')}", str(v))]
        code, output = command.run(f"{shlex.join(flags)} --save {save}")
        assert code == 0, output
        seen.append((command.losses(str(save)), settings))

    monkeypatch.setattr(api, "train", train)
    words = "base/iter_0000032 --target-sizes 'nexus_m=24 nexus_a=28' --probe 4 --probe-seeds 1 --json"
    run(shlex.split(words))
    found = json.loads(console.readouterr().out)
    losses, control = command.losses("base"), seen[0][0]
    assert control == {step: losses[step] for step in range(33, 37)}  # to the bit: nothing decays before 37
    probed = {one["recipe"]: one for one in found["probe"]}
    assert len(seen) == 1 + len(probed) == 1 + len({json.dumps(s["growth"]) for s in probed.values()})
    for name in ("as asked for", "init=out_rand", "moments=reset"):  # which keep the function
        assert abs(probed[name]["at_once"]["mean"]) < 1e-5
    assert abs(probed["init=random"]["at_once"]["mean"]) > 1e-4
    assert all(one["loss"]["half"] is None for one in probed.values())  # one seed has no interval
    assert all(one["kl"]["mean"] > 0 for one in probed.values())
    best = min(probed.values(), key=lambda one: one["loss"]["mean"])
    assert found["probe"][0] == best and best["to_best"]["mean"] == 0.0
    assert not list(command.folder.glob("advise-*"))
