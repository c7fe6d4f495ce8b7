"""Costs follow from the specs, and layers are cut where the most expensive run is cheapest."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from megatron_nexus.config.model_config import MOST_LAYERS
from megatron_nexus.spec.cost import (
    attention_flops_per_token,
    balanced_cuts,
    parameter_count,
    weight_flops_per_token,
)
from megatron_nexus.spec.param import Axis, Constant, Layout, Normal, ParamSpec, Role


def spec_of(role: Role, *sizes: int) -> ParamSpec:
    axes = tuple(Axis(f"axis{i}", size, Layout.SHARDED_PADDED) for i, size in enumerate(sizes))
    return ParamSpec(role.value, axes, Normal(1.0), role)


SPECS = [spec_of(Role.MATMUL, 7, 5), spec_of(Role.LOOKUP, 100, 5), spec_of(Role.VECTOR, 5)]


def test_logical_elements_are_counted_without_padding() -> None:
    assert parameter_count(SPECS) == 7 * 5 + 100 * 5 + 5


def test_only_matrix_products_cost_two_operations_an_element() -> None:
    assert weight_flops_per_token(SPECS) == 2 * 7 * 5


def test_attention_costs_scores_and_values_over_the_whole_sequence() -> None:
    # Each of T positions: one product of width H with the query, one multiply-add of width H for the value.
    assert attention_flops_per_token(attention_width=6, seq_length=10) == 10 * (2 * 6 + 2 * 6)
    # Order 3: two inner attentions for queries and keys of order 2, two for those of order 3, the outer one.
    assert attention_flops_per_token(6, seq_length=10, inner_width=4 * 6) == 5 * 10 * (2 * 6 + 2 * 6)


@pytest.mark.parametrize(("role", "decays"), [(Role.MATMUL, True), (Role.LOOKUP, True), (Role.VECTOR, False)])
def test_gains_do_not_decay(role: Role, decays: bool) -> None:
    assert ParamSpec("x", (Axis("d", 3),), Constant(1.0), role).decays is decays


def most_expensive(costs: list[int], cuts: list[int]) -> int:
    return max(sum(costs[first:last]) for first, last in pairwise(cuts))


def test_no_cut_is_better_than_the_balanced_one() -> None:
    rng = np.random.default_rng(3)
    for _ in range(150):
        count = int(rng.integers(1, 9))
        costs = [int(cost) for cost in rng.integers(0, 40, count)]
        parts = int(rng.integers(1, count + 1))
        cuts = balanced_cuts(costs, parts)
        assert len(cuts) == parts + 1
        assert (cuts[0], cuts[-1]) == (0, count)
        assert all(first < last for first, last in pairwise(cuts)), "an empty stage"
        every = ([0, *inner, count] for inner in combinations(range(1, count), parts - 1))
        assert most_expensive(costs, cuts) == min(most_expensive(costs, other) for other in every)


def test_the_deepest_model_is_cut_alike() -> None:
    costs = [0, *[3] * MOST_LAYERS, 5]
    assert most_expensive(costs, balanced_cuts(costs, 8)) == 3 * MOST_LAYERS // 8 + 3


def test_a_dear_head_gets_a_stage_of_its_own() -> None:
    assert balanced_cuts([0, 10, 10, 10, 10, 40], 2) == [0, 5, 6]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(AssertionError, match="3 layers make no 4 stages"):
        balanced_cuts([1, 1, 1], 4)
