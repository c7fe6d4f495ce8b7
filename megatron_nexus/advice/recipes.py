"""The recipes that a growth could be done by: every choice of `GrowthConfig`, where it makes a difference.

Read off the code: a choice that is added to `GrowthConfig` is tried by itself. One that does nothing alone
but something together with another, as Adam's moments of copied layers, is tried with it.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_nexus.checkpoint.manifest import OptimizerRecord
from megatron_nexus.checkpoint.saved_run import SavedRun
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.errors import ConfigError
from megatron_nexus.growth.plan import TensorPlan, grown_manifest, plan_growth
from megatron_nexus.growth.request import GrowthRequest
from megatron_nexus.growth.settings import GrowthConfig

NOT_TRIED = (("init", "zero"), ("init", "auto"))
"""The paper's choice, whose new weights stay zero (tests/growth/test_laws.py), and what is another's name."""

_Effect = tuple[ModelConfig, list[tuple[str, TensorPlan]], OptimizerRecord]


@dataclass(frozen=True)
class Recipe:
    """How new weights begin, and what of it differs from the recipe that was asked for."""

    settings: GrowthConfig
    changes: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Its differences as --grow has them."""
        return " ".join(f"{field}={value}" for field, value in self.changes) or "as asked for"


def recipes(saved: SavedRun, request: GrowthRequest) -> list[Recipe]:
    """Return the recipes for a growth of a checkpoint, the one of `request` first, no two of one effect."""
    asked = Recipe(request.settings, ())
    found = [(asked, _effect(saved, request, asked))]
    silent = []
    for recipe in _variations(asked):
        effect = _effect(saved, request, recipe)
        if effect is not None and effect == found[0][1]:
            silent.append(recipe)
        _add(found, recipe, effect)
    for first, _ in found[1:]:
        for second in silent:
            both = _changed(first, second.changes)
            _add(found, both, _effect(saved, request, both))
    return [recipe for recipe, _ in found]


def _add(found: list[tuple[Recipe, _Effect | None]], recipe: Recipe, effect: _Effect | None) -> None:
    if effect is not None and all(effect != known for _, known in found):
        found.append((recipe, effect))


def _variations(asked: Recipe) -> list[Recipe]:
    made = []
    for field, kind in get_type_hints(GrowthConfig).items():
        values = get_args(kind) if get_origin(kind) is Literal else ()
        for value in values:
            if value != getattr(asked.settings, field) and (field, value) not in NOT_TRIED:
                made.append(_changed(asked, ((field, value),)))
    return made


def _changed(recipe: Recipe, changes: tuple[tuple[str, str], ...]) -> Recipe:
    settings: dict[str, Any] = dict(changes)
    return Recipe(replace(recipe.settings, **settings), (*recipe.changes, *changes))


def _effect(saved: SavedRun, request: GrowthRequest, recipe: Recipe) -> _Effect | None:
    """Return what a recipe makes of the checkpoint; None where the model cannot grow by it."""
    try:
        plan = plan_growth(saved.config, replace(request, settings=recipe.settings))
    except ConfigError:
        return None
    return plan.after.model, list(plan.tensors.items()), grown_manifest(saved.manifest, plan, "").optimizer
