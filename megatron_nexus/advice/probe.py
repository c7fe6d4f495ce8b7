"""A probe: a few real steps after a growth, by each recipe and seed, on the batches that the run reads next.

Every growth goes the product's own way, `train --load ... --grow ...`, at the checkpoint's learning rate, and
so does the checkpoint itself without growth: losses are differences to it on the same batches. KL is of the
parent's predictions to the grown model's, on tokens that no step reads; both are computed one layer at a
time. A probe ranks beginnings: a recipe that begins with a jump, as stacking does, may still end best.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_nexus.advice.recipes import Recipe
from megatron_nexus.analysis.estimate import Estimate, estimate
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.command_line import IN_STEPS
from megatron_nexus.config.data_path import Source
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import learning_rate, run_end
from megatron_nexus.data.default_corpus import cache_folder, prepare_default_corpus
from megatron_nexus.data.run_data import RunData, tokenizer_path, training_sources
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer_record import TokenizerRecord
from megatron_nexus.growth.request import GrowthRequest
from megatron_nexus.growth.verify import layerwise_logits
from megatron_nexus.log import Progress
from megatron_nexus.training.metrics import METRICS_FILE, held_out_curve, read_metrics, training_curve

KL_TOKENS = 2048
"""At most so many tokens' predictions are compared: two tensors of them times the vocabulary."""

Train = Callable[[Path, Mapping[str, int | float | str]], object]
"""Trains into a folder with settings such as load and grow, in processes of its own."""


@dataclass(frozen=True)
class Probed:
    """A recipe of a target. Losses minus those of the checkpoint without growth, nats per token.

    `growth`: the value of --grow. `at_once`: of the first batch, before any step. `loss`: held out, after the
    last one. `to_best`: minus the best recipe of the target, by seed.
    """

    target: str
    recipe: str
    growth: str
    at_once: Estimate
    loss: Estimate
    kl: Estimate
    to_best: Estimate


@dataclass(frozen=True)
class Outcome:
    """What one run of a probe gave."""

    first: float
    last: float
    kl: float


def probe(
    saved: SavedRun,
    record: TokenizerRecord,
    targets: Mapping[str, tuple[GrowthRequest, Sequence[Recipe]]],
    steps: int,
    seeds: int,
    folder: Path,
    train: Train,
) -> list[Probed]:
    """Train each recipe of each target for `steps` steps from each of `seeds` seeds, in `folder`."""
    tokens = held_out(saved.config, record)
    runs = 1 + seeds * sum(len(found) for _, found in targets.values())
    with Progress(f"probing {steps} steps", runs, "runs") as progress:
        parent = _logits(saved.checkpoint, tokens)
        control = _run(saved, "", steps, folder, train, tokens, parent)
        progress.advance(1)
        made: list[Probed] = []
        for target, (request, found) in targets.items():
            outcomes: dict[Recipe, list[Outcome]] = {}
            for recipe in found:
                for seed in range(1, seeds + 1):
                    text = growth_text(request, recipe, seed)
                    outcomes.setdefault(recipe, []).append(
                        _run(saved, text, steps, folder, train, tokens, parent)
                    )
                    progress.advance(1)
            made += _compare(target, request, outcomes, control)
    return made


def _compare(
    target: str, request: GrowthRequest, outcomes: Mapping[Recipe, Sequence[Outcome]], control: Outcome
) -> list[Probed]:
    """Return the recipes of a target, the best first."""
    ranked = sorted(outcomes.items(), key=lambda item: float(np.mean([o.last for o in item[1]])))
    best = ranked[0][1]
    return [
        Probed(
            target,
            recipe.name,
            growth_text(request, recipe, None),
            estimate([o.first - control.first for o in found]),
            estimate([o.last - control.last for o in found]),
            estimate([o.kl for o in found]),
            estimate([o.last - b.last for o, b in zip(found, best, strict=True)]),
        )
        for recipe, found in ranked
    ]


def growth_text(request: GrowthRequest, recipe: Recipe, seed: int | None) -> str:
    """Return the value of --grow for a recipe: sizes, and the settings that are not the default."""
    default = type(recipe.settings)()
    given = {name: v for name, v in vars(recipe.settings).items() if v != getattr(default, name)}
    if seed is not None:
        given["growth_seed"] = seed
    return " ".join(f"{name}={value}" for name, value in {**request.sizes, **given}.items())


def _run(
    saved: SavedRun, grow: str, steps: int, folder: Path, train: Train, tokens: Tensor, parent: Tensor
) -> Outcome:
    """Train from the checkpoint, grown or not, and remove what it saved once it is measured."""
    save = folder / "run"
    train(save, probe_settings(saved, grow, steps))
    records = read_metrics(save / METRICS_FILE)
    losses, validated = [loss for _, loss in training_curve(records)], held_out_curve(records)
    last = validated[-1][1] if validated else float(np.mean(losses[len(losses) // 2 :]))
    child = _logits(open_saved_run(save).checkpoint, tokens)[..., : parent.shape[-1]]
    shutil.rmtree(save)
    p, q = (logits.log_softmax(-1) for logits in (parent, child))
    return Outcome(losses[0], last, float((p.exp() * (p - q)).sum(-1).mean()))


def probe_settings(saved: SavedRun, grow: str, steps: int) -> dict[str, int | float | str]:
    """Return the settings of a run of a probe: the checkpoint's own, at a constant learning rate."""
    optimizer, progress = saved.config.optimizer, saved.manifest.progress
    at = progress.samples if optimizer.counts_samples else progress.step
    rate = learning_rate(optimizer, max(1, at), run_end(saved.config))
    grown: dict[str, int | float | str] = {"grow": grow} if grow else {}
    return grown | {
        "load": str(saved.checkpoint),
        "train_iters": progress.step + steps,
        "lr": rate,
        "min_lr": min(rate, optimizer.min_lr),
        "lr_decay_style": "constant",
        **dict.fromkeys(IN_STEPS, 0),
        "save_interval": 0,
        "eval_interval": 0,
    }


def held_out(config: RunConfig, record: TokenizerRecord) -> Tensor:
    """Return samples [B, T] that a run validates on, or, where it does not, the last of its training data."""
    if sources := training_sources(config.data):
        data = RunData(config, sources, tokenizer_path(config.data))
    else:
        cache, path = cache_folder(config.data.data_cache_path), tokenizer_path(config.data)
        tokenizer = find_tokenizer(config, record) if path is None else None
        built_in = prepare_default_corpus(cache, config.model.vocab_size, tokenizer=tokenizer)
        data = RunData(
            config, (Source(built_in.prefix, None),), built_in.tokenizer_path, built_in.prepend_bos
        )
    count = max(1, KL_TOKENS // config.training.seq_length)
    blend = next((b for name, b in data.evaluations.items() if name.startswith("validation")), data.training)
    first = 0 if data.evaluations else max(0, blend.epoch_samples - count)
    samples = [blend.sample(first + k)[:-1] for k in range(count)]
    return torch.from_numpy(np.stack(samples).astype(np.int64))[:, :KL_TOKENS]


def _logits(checkpoint: Location, tokens: Tensor) -> Tensor:
    """Return the predictions of a checkpoint's model for tokens, in float32."""
    model = open_saved_run(checkpoint).config.model
    with torch.no_grad():
        return layerwise_logits(model, CheckpointReader(checkpoint), tokens, torch.float32)
