"""What routing does to loads, bytes and time: a sweep over experts, top k, capacity and skew.

Counts are exact for the sampled routing; times are *modelled* from rates that the caller gives,
measured ones where there are any.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.load import load_statistics
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.routing import (
    SyntheticRouter,
    drop_over_capacity,
    expert_capacity,
    expert_counts,
)
from ch15_helpers.moe.topology import Topology
from ch15_helpers.moe.traffic import LinkSpeeds, count_links, least_time_s, network_bytes


@dataclass(frozen=True)
class SweepSetup:
    """What stays the same in a sweep.

    Attributes:
        tokens_per_rank: of each batch. hidden: size of a hidden state in bfloat16.
        s_per_pair: time of one (token, expert) pair on one rank, in s.
    """

    topology: Topology
    speeds: LinkSpeeds
    tokens_per_rank: int
    hidden: int
    s_per_pair: float
    seed: int = 0


@dataclass(frozen=True)
class SweepRow:
    """One point.

    Attributes:
        capacity_factor: None drops nothing.
        gini, max_over_mean: of experts' loads before the capacity cuts them.
        rank_max_over_mean: of ranks' loads after it.
        dropped: share of the pairs that the capacity cut.
        node_bytes, network_bytes: inside nodes and between them, of one layer.
        step_s: modelled: the busiest rank's pairs and the busiest ports, one after the other.
    """

    num_experts: int
    top_k: int
    skew: float
    capacity_factor: float | None
    gini: float
    max_over_mean: float
    rank_max_over_mean: float
    dropped: float
    node_bytes: int
    network_bytes: int
    step_s: float


def sweep_routing(
    setup: SweepSetup,
    num_experts: Sequence[int],
    top_k: Sequence[int],
    skews: Sequence[float],
    capacity_factors: Sequence[float | None],
) -> Iterator[SweepRow]:
    """Every combination, one row each; the same seed routes alike whatever the capacity."""
    for experts, k, skew in itertools.product(num_experts, top_k, skews):
        router = SyntheticRouter(experts, k, skew=skew, seed=setup.seed)
        ranks = range(setup.topology.num_ranks)
        batches = [router.route(setup.tokens_per_rank)[1] for _ in ranks]
        for factor in capacity_factors:
            yield _point(setup, experts, skew, factor, batches)


def _point(
    setup: SweepSetup, num_experts: int, skew: float, factor: float | None, batches: list[Tensor]
) -> SweepRow:
    topology, top_k = setup.topology, batches[0].shape[1]
    placement = ExpertPlacement.even(num_experts, topology.num_ranks)
    nodes = topology.ranks_per_node if topology.num_nodes > 1 else None
    config = ExpertParallelConfig(capacity_factor=factor, ranks_per_node=nodes)
    before = load_statistics(expert_counts(torch.cat(batches), num_experts).tolist())
    kept = batches
    if factor is not None:
        capacity = expert_capacity(setup.tokens_per_rank, top_k, num_experts, factor)
        kept = [drop_over_capacity(batch, num_experts, capacity) for batch in batches]
    counts = expert_counts(torch.cat(kept), num_experts).tolist()
    ranks = load_statistics([sum(counts[e] for e in row if e >= 0) for row in placement.slots])
    links = count_links(batches, placement, config, setup.hidden, torch.bfloat16, top_k)
    inside, between = network_bytes(links, topology)
    travel_s = sum(least_time_s(links, topology, setup.speeds).values())
    pairs = sum(batch.numel() for batch in batches)
    return SweepRow(
        num_experts, top_k, skew, factor, before.gini, before.max_over_mean, ranks.max_over_mean,
        1 - sum(counts) / pairs if pairs else 0.0, inside, between,
        max(ranks.counts) * setup.s_per_pair + travel_s,
    )  # fmt: skip
