"""Placement of experts: bounds, nothing lost, never worse; rebalancing under drift."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.balancing import (
    balance_greedy,
    balance_hierarchical,
    imbalance,
    pack,
    rank_loads,
    replicate,
)
from ch15_helpers.moe.placement import ExpertPlacement

LOAD = st.one_of(st.just(0.0), st.floats(0, 1e6), st.integers(0, 50).map(float))


@settings(max_examples=60, deadline=None)
@given(st.lists(LOAD, min_size=1, max_size=4), st.integers(0, 5))
def test_replicas_are_the_best_possible(loads, spare):
    found = replicate(loads, len(loads) + spare)
    assert sum(found) == len(loads) + spare and min(found) >= 1
    best = min(
        max(load / count for load, count in zip(loads, counts, strict=True))
        for counts in itertools.product(range(1, spare + 2), repeat=len(loads))
        if sum(counts) == len(loads) + spare
    )
    assert max(a / b for a, b in zip(loads, found, strict=True)) == pytest.approx(best)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_packing_keeps_its_bound(num_bins, size, data):
    weights = data.draw(st.lists(LOAD, min_size=num_bins * size, max_size=num_bins * size))
    bins = pack(weights, num_bins)
    assert sorted(i for items in bins for i in items) == list(range(len(weights)))
    assert {len(items) for items in bins} == {size}
    sums = [sum(weights[i] for i in items) for items in bins]
    slack = 1e-6 * max(1.0, max(sums))
    assert max(sums) - min(sums) <= max(weights) - min(weights) + slack


def test_swaps_mend_what_heaviest_first_leaves():
    """Heaviest first makes 3 + 2 + 2 and 3 + 2 + 0; trading a 3 for a 2 makes both 6."""
    weights = [3.0, 3.0, 2.0, 2.0, 2.0, 0.0]
    assert [sum(weights[i] for i in items) for items in pack(weights, 2)] == [6, 6]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([(2, 1), (4, 2), (4, 1), (8, 4)]), st.integers(0, 3), st.data())
def test_balancing_keeps_every_expert_and_is_never_worse(shape, spare, data):
    num_ranks, num_nodes = shape
    num_groups = num_nodes * data.draw(st.integers(1, 2))
    num_experts = num_groups * data.draw(st.integers(1, 4))
    loads = data.draw(st.lists(LOAD, min_size=num_experts, max_size=num_experts))
    size = -(-num_experts // num_ranks) + spare
    even = ExpertPlacement.even(num_experts, num_ranks, size)
    greedy = balance_greedy(loads, num_ranks, size)
    nodes = balance_hierarchical(loads, num_ranks, size, num_ranks // num_nodes, num_groups)
    for found in (greedy, nodes):
        assert (found.num_ranks, found.slots_per_rank) == (num_ranks, size)
        assert all(found.replicas)
        assert imbalance(loads, found) <= imbalance(loads, even)
        assert sum(rank_loads(loads, found)) == pytest.approx(sum(loads))
        again = balance_greedy(loads, num_ranks, size, current=found)
        assert imbalance(loads, again) <= imbalance(loads, found)


def test_groups_stay_in_one_node():
    loads = np.random.default_rng(0).pareto(1.0, 32).tolist()
    found = balance_hierarchical(loads, 8, 5, ranks_per_node=4, num_groups=8)
    homes = [{slot // 20 for slot in slots} for slots in found.replicas]
    for group in range(8):
        members = [homes[e] for e in range(group * 4, group * 4 + 4)]
        assert len(set().union(*members)) == 1


def test_one_hot_expert_is_shared_by_its_replicas():
    loads = [100.0, *[1.0] * 7]
    even = ExpertPlacement.even(8, 4, 4)
    balanced = balance_greedy(loads, 4, 4)
    assert imbalance(loads, even) > 3.7
    # 16 slots: the best split of the hot one leaves 100 / 9 for each of its nine replicas.
    assert imbalance(loads, balanced) < 1.3


def test_impossible_sizes_are_refused():
    with pytest.raises(MoEError, match="cannot hold"):
        replicate([1, 2, 3], 2)
    with pytest.raises(MoEError, match="finite"):
        replicate([1, float("nan")], 3)
    with pytest.raises(MoEError, match="evenly"):
        pack([1, 2, 3], 2)
    with pytest.raises(MoEError, match="must divide"):
        balance_hierarchical([1.0] * 6, 4, 2, 2, num_groups=4)
