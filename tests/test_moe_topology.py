"""Placement by affinity, bytes between nodes and their modelled time; rebalancing under drift."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ch15_helpers.disagg.clock import VirtualClock
from ch15_helpers.disagg.fabric import Fabric
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.errors import MoEError
from ch15_helpers.moe.affinity import place_by_affinity
from ch15_helpers.moe.balancing import balance_greedy
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.placement import ExpertPlacement, SlotChooser
from ch15_helpers.moe.rebalance import (
    keep_in_place,
    moved_bytes,
    plan_moves,
    serve_under_drift,
    stall_s,
)
from ch15_helpers.moe.routing import SyntheticRouter, expert_counts
from ch15_helpers.moe.sweep import SweepSetup, sweep_routing
from ch15_helpers.moe.topics import route_topics
from ch15_helpers.moe.topology import Topology
from ch15_helpers.moe.traffic import (
    LinkSpeeds,
    count_links,
    least_time_s,
    network_bytes,
    time_on_fabric,
)

HIDDEN = 64


def batches_of(num_ranks, num_experts, top_k, skew=0.8, seed=0, tokens=60):
    router = SyntheticRouter(num_experts, top_k, skew=skew, seed=seed)
    return [router.route(tokens)[1] for _ in range(num_ranks)]


def links_of(batches, placement, **options):
    config = ExpertParallelConfig(**options)
    top_k = batches[0].shape[1]
    return count_links(batches, placement, config, HIDDEN, torch.bfloat16, top_k)


@pytest.mark.parametrize("seed", range(4))
def test_each_saving_saves(seed):
    """Deduplication, two levels and FP8 each move no more between nodes, and here less."""
    topology = Topology(8, 4)
    batches, placement = batches_of(8, 32, 6, seed=seed), ExpertPlacement.even(32, 8)
    pairs, ranks, nodes, small = (
        network_bytes(links_of(batches, placement, **options), topology)[1]
        for options in (
            {"deduplicate": False},
            {},
            {"ranks_per_node": 4},
            {"ranks_per_node": 4, "fp8_dispatch": True},
        )
    )
    assert pairs > ranks > nodes > small


def test_bytes_by_hand():
    """Two nodes of two; a token of rank 0 with experts on ranks 2 and 3, and one on its own."""
    batches = [torch.tensor([[2, 3, 0]])] + [torch.zeros(0, 3, dtype=torch.int64)] * 3
    placement = ExpertPlacement.even(4, 4)
    row, back = 2 * HIDDEN + 32, 2 * HIDDEN  # 3 slots and weights take 24 bytes, padded to 32
    flat = links_of(batches, placement)
    assert {k: v for k, v in flat.items() if k[0] != "counts"} == {
        ("dispatch", 0, 2): row, ("dispatch", 0, 3): row,
        ("combine", 2, 0): back, ("combine", 3, 0): back,
    }  # fmt: skip
    two = links_of(batches, placement, ranks_per_node=2)
    assert {k: v for k, v in two.items() if not k[0].startswith("counts")} == {
        ("dispatch across", 0, 2): row, ("dispatch inside", 2, 3): row,
        ("combine inside", 3, 2): back, ("combine across", 2, 0): back,
    }  # fmt: skip
    speeds = LinkSpeeds(100.0, 10.0, 1e-6, 5e-6)
    times = least_time_s(two, Topology(4, 2), speeds)
    assert times["dispatch across"] == pytest.approx(5e-6 + row / 10e9)
    assert times["combine inside"] == pytest.approx(1e-6 + back / 100e9)
    assert list(times).index("dispatch across") < list(times).index("dispatch inside")


@pytest.mark.parametrize("options", [{}, {"ranks_per_node": 2}])
def test_a_fabric_that_queues_takes_longer_than_the_busiest_port(options):
    topology = Topology(4, 2)
    links = links_of(batches_of(4, 16, 4), ExpertPlacement.even(16, 4), **options)
    near, far = LinkModel(1e-6, 100.0), LinkModel(5e-6, 10.0)
    clock = VirtualClock()
    routes = {(a, b): far if topology.crosses(a, b) else near for a in range(4) for b in range(4)}
    fabric = Fabric(routes, clock)
    times = time_on_fabric(
        links, 4, lambda route, count: fabric.send(route, count).arrives_s, clock.advance_to
    )
    least = least_time_s(links, topology, LinkSpeeds(100.0, 10.0, 1e-6, 5e-6))
    assert list(times) == list(least)
    assert all(times[what] >= least[what] * (1 - 1e-9) for what in times)
    assert sum(times.values()) < 3 * sum(least.values())
    moved = Counter()
    for (_, source, target), count in links.items():
        moved[source, target] += count
    assert fabric.bytes_by_route == moved


def clustered(num_ranks, seed, tokens=80, mixed=0.1):
    """Experts 0, 2, 4 … work together and 1, 3, 5 … do: an even placement separates them."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_ranks):
        parity = torch.randint(0, 2, (tokens, 1), generator=generator)
        order = torch.rand(tokens, 8, generator=generator).argsort(-1)[:, :3]
        ids = 2 * order + parity
        other = torch.rand(tokens, 16, generator=generator).argsort(-1)[:, :3]
        mix = torch.rand(tokens, 1, generator=generator) < mixed
        batches.append(torch.where(mix, other, ids))
    return batches


def test_experts_that_work_together_share_a_node():
    topology = Topology(4, 2)
    sample, later = clustered(4, 0), clustered(4, 1)
    placement = place_by_affinity(sample, 16, topology, 4)
    homes = [slots[0] // 8 for slots in placement.replicas]
    assert len(set(homes[::2])) == 1 and len(set(homes[1::2])) == 1
    options = {"ranks_per_node": 2, "nearest_replica": True}
    even = network_bytes(links_of(later, ExpertPlacement.even(16, 4), **options), topology)[1]
    placed = network_bytes(links_of(later, placement, **options), topology)[1]
    assert placed < 0.75 * even


def test_copies_keep_company_and_more_room_never_moves_more():
    """Four nodes: a foreign pair goes to the next node that has it, with its company."""
    topology = Topology(8, 2)
    sample = [route_topics(100, 64, 6, 4, seed=rank)[1] for rank in range(8)]
    options = {"ranks_per_node": 2, "nearest_replica": True}
    crossing = [
        network_bytes(links_of(sample, place_by_affinity(sample, 64, topology, size), **options),
                      topology)[1]
        for size in (8, 10, 16, 32)
    ]  # fmt: skip
    assert crossing == sorted(crossing, reverse=True)
    assert crossing[2] < 0.9 * crossing[0]
    assert crossing[3] == 8 * 3 * 8  # everything everywhere: only counts are left


def test_the_nearest_replica_is_here_or_inside_or_in_the_next_node():
    rows = ((0, 1), (2, 4), (3, 4), (5, 0), (1, 2), (5, 6))  # three nodes of two ranks
    placement = ExpertPlacement(7, rows)
    ids = torch.arange(7)[None]
    for rank, homes in {0: [0, 0, 1, 2, 1, 3, 5], 2: [3, 4, 4, 2, 2, 3, 5]}.items():
        choose = SlotChooser(placement, rank, ranks_per_node=2)
        assert (choose(ids) // 2)[0].tolist() == homes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_affinity_never_moves_more_and_copies_move_less(seed, spare):
    num_experts = 10 + seed
    topology = Topology(4, 2)
    batches = batches_of(4, num_experts, 3, skew=1.2, seed=seed)
    size = -(-num_experts // 4) + spare
    options = {"ranks_per_node": 2, "nearest_replica": True}
    even = ExpertPlacement.even(num_experts, 4, size)
    placed = place_by_affinity(batches, num_experts, topology, size)
    crossing = [network_bytes(links_of(batches, p, **options), topology)[1] for p in (even, placed)]
    assert crossing[1] <= crossing[0]
    assert spare < 3 or crossing[1] < 0.6 * crossing[0]
    assert (placed.num_ranks, placed.slots_per_rank) == (4, size)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(MoEError, match="multiple of ranks_per_node"):
        Topology(6, 4)
    with pytest.raises(MoEError, match="expected one each"):
        place_by_affinity(batches_of(2, 8, 2), 8, Topology(4, 2), 2)
    with pytest.raises(MoEError, match="same experts"):
        plan_moves(ExpertPlacement.even(4, 2), ExpertPlacement.even(4, 4))


@pytest.mark.parametrize("seed", range(5))
def test_moves_make_the_new_placement_and_keeping_saves_some(seed):
    loads = [SyntheticRouter(16, 1, skew=1, seed=s).popularity.tolist() for s in (seed, seed + 50)]
    old, new = (balance_greedy(x, 4, 6) for x in loads)
    kept = keep_in_place(old, new, 2)
    for first in (0, 2):
        pair = [sorted(sorted(row) for row in p.slots[first : first + 2]) for p in (new, kept)]
        assert pair[0] == pair[1]
    flat = [e for row in old.slots for e in row]
    target = flat.copy()
    for move in plan_moves(old, kept, 2):
        assert flat[move.source_slot] == move.expert
        target[move.target_slot] = move.expert
    assert target == [e for row in kept.slots for e in row]
    plain, fewer = (sum(moved_bytes(plan_moves(old, p, 2), 6, 100).values()) for p in (new, kept))
    assert fewer <= plain
    assert not plan_moves(old, old)


def test_the_stall_is_that_of_the_busiest_port():
    links = Counter({(0, 1): 3_000_000_000, (0, 2): 1_000_000_000, (3, 2): 2_000_000_000})
    assert stall_s(links, 2.0) == pytest.approx(2.0)
    assert stall_s(Counter(), 2.0) == 0


def drifting_counts(drift, batches=40, shift=None):
    router = SyntheticRouter(32, 4, skew=1.0, drift=drift, seed=3)
    counts = []
    for batch in range(batches):
        if batch == shift:
            router.shift()
        counts.append(expert_counts(router.route(256)[1], 32).tolist())
    return counts


def serve(counts, interval, **options):
    fields = {"window": 8, "s_per_pair": 1e-6, "bytes_per_expert": 10**6, "port_GBps": 50.0}
    return serve_under_drift(counts, 8, 5, interval=interval, **(fields | options))


def test_rebalancing_gains_when_still_and_after_a_shift_and_its_stall_is_counted():
    still = drifting_counts(0.0)
    fixed, moved = serve(still, None), serve(still, 8)
    assert (fixed.num_rebalances, fixed.stall_s, fixed.moved_bytes) == (0, 0, 0)
    assert moved.num_rebalances >= 1
    assert moved.compute_s < 0.8 * fixed.compute_s
    assert moved.moved_bytes % 10**6 == 0 and moved.stall_s >= moved.moved_bytes / 8 / 50e9
    shifted = serve(drifting_counts(0.0, shift=20), 8)
    before, hurt, after = (shifted.max_over_mean[i] for i in (19, 21, 39))
    assert hurt > 1.3 * before and after < 0.8 * hurt


def test_noise_moves_no_weights_where_a_gain_is_asked_for():
    router = SyntheticRouter(32, 4, skew=0.0, seed=3)
    even = [expert_counts(router.route(256)[1], 32).tolist() for _ in range(20)]
    always, careful = serve(even, 4), serve(even, 4, least_gain=0.15)
    assert always.moved_bytes > 0 == careful.moved_bytes
    assert careful.total_s < always.total_s
    assert serve(drifting_counts(0.0), 8, least_gain=0.15).num_rebalances == 1


def test_rebalancing_loses_when_weights_are_heavy_and_loads_change_faster_than_the_window():
    fast = drifting_counts(1.0)
    slow_link = {"port_GBps": 0.05}
    assert serve(fast, 4, **slow_link).total_s > serve(fast, None, **slow_link).total_s
    with pytest.raises(MoEError, match="window"):
        serve(fast, 0)


def test_a_sweep_shows_what_skew_and_capacity_do():
    setup = SweepSetup(Topology(4, 2), LinkSpeeds(100.0, 10.0), 128, 64, s_per_pair=1e-6)
    rows = {
        (r.num_experts, r.top_k, r.skew, r.capacity_factor): r
        for r in sweep_routing(setup, [16, 32], [1, 4], [0.0, 1.2], [None, 1.0, 2.0])
    }
    assert len(rows) == 24
    for (experts, k, skew, factor), row in rows.items():
        free = rows[experts, k, skew, None]
        assert (row.gini, row.max_over_mean) == (free.gini, free.max_over_mean)
        assert row.network_bytes <= free.network_bytes and row.step_s <= free.step_s
        if factor is None:
            assert row.dropped == 0
            assert skew == 0 or row.gini > rows[experts, k, 0.0, None].gini + 0.2
            assert skew == 0 or row.step_s > rows[experts, k, 0.0, None].step_s
        else:
            assert row.rank_max_over_mean * (1 - row.dropped) <= factor + 0.2
    assert rows[16, 4, 1.2, 1.0].dropped > rows[16, 4, 1.2, 2.0].dropped > 0
    assert rows[32, 4, 0.0, None].network_bytes > rows[32, 1, 0.0, None].network_bytes
