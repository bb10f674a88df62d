"""Bytes of a dispatch and combine on each link, counted without moving any, and their time.

The count is exact: tests hold it against what real ranks put on their links. The times are
*modelled*.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.moe.dispatch import Link
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig, wire_format
from ch15_helpers.moe.placement import ExpertPlacement, SlotChooser
from ch15_helpers.moe.routing import drop_over_capacity, expert_capacity
from ch15_helpers.moe.topology import Topology

_COUNT_BYTES = 8  # one int64 for each peer
ORDER = (
    "counts", "counts across", "dispatch", "dispatch across", "counts inside", "dispatch inside",
    "combine inside", "combine", "combine across",
)  # fmt: skip
"""Phases in the order in which they happen; one waits for the other."""


def count_links(
    experts: Sequence[Tensor],
    placement: ExpertPlacement,
    config: ExpertParallelConfig,
    hidden: int,
    dtype: torch.dtype,
    top_k: int,
) -> Counter[Link]:
    """Bytes that one layer puts on each link between ranks.

    Args:
        experts: int64 [num_tokens, top_k] of each rank's batch, what its router chose.
        hidden, dtype: of the hidden states.
    """
    wire = wire_format(hidden, dtype, top_k, config)
    sizes = {
        "dispatch": wire.row_bytes,
        "combine": hidden * (config.combine_dtype or dtype).itemsize,
    }
    topology = Topology(placement.num_ranks, config.ranks_per_node or placement.num_ranks)
    links: Counter[Link] = Counter()
    for source, chosen in enumerate(experts):
        for level, start, end, rows in _hops(source, chosen, placement, config, topology):
            if start != end:
                links["dispatch" + level, start, end] += rows * sizes["dispatch"]
                links["combine" + level, end, start] += rows * sizes["combine"]
    return links if config.max_tokens is not None else links + _counts(topology, config)


def _hops(
    source: int,
    experts: Tensor,
    placement: ExpertPlacement,
    config: ExpertParallelConfig,
    topology: Topology,
) -> list[tuple[str, int, int, int]]:
    """(level, from, to, rows) of a rank's batch, rows that stay included."""
    if config.max_tokens is not None:
        return _fixed_hops(source, config.max_tokens, config, topology)
    if config.capacity_factor is not None:
        num_tokens, top_k = experts.shape
        factor, num_experts = config.capacity_factor, placement.num_experts
        capacity = expert_capacity(num_tokens, top_k, num_experts, factor)
        experts = drop_over_capacity(experts, num_experts, capacity)
    near = config.ranks_per_node if config.nearest_replica else None
    slots = SlotChooser(placement, source, ranks_per_node=near)(experts)
    ranks = slots.div(placement.slots_per_rank, rounding_mode="floor")
    to_ranks = _rows(ranks, topology.num_ranks, config.deduplicate)
    if config.ranks_per_node is None:
        return [("", source, target, rows) for target, rows in enumerate(to_ranks)]
    nodes = ranks.div(topology.ranks_per_node, rounding_mode="floor")
    to_nodes = _rows(nodes, topology.num_nodes, config.deduplicate)
    hops = [
        (" across", source, topology.gateway(source, node), rows)
        for node, rows in enumerate(to_nodes)
    ]
    return hops + [
        (" inside", topology.gateway(source, topology.node_of(target)), target, rows)
        for target, rows in enumerate(to_ranks)
    ]


def _fixed_hops(
    source: int, rows: int, config: ExpertParallelConfig, topology: Topology
) -> list[tuple[str, int, int, int]]:
    """Messages of one size to everybody, whatever was routed."""
    if config.ranks_per_node is None:
        return [("", source, target, rows) for target in range(topology.num_ranks)]
    nodes = range(topology.num_nodes)
    first = topology.node_of(source) * topology.ranks_per_node
    inside = range(first, first + topology.ranks_per_node)
    return [(" across", source, topology.gateway(source, node), rows) for node in nodes] + [
        (" inside", source, target, rows * topology.num_nodes) for target in inside
    ]


def _rows(homes: Tensor, num_homes: int, dedup: bool) -> list[int]:
    """Copies for each home, int64 [num_tokens, k] with -1 for none."""
    pairs = homes + torch.arange(len(homes))[:, None] * num_homes
    pairs = pairs[homes >= 0]
    pairs = torch.unique(pairs) if dedup else pairs
    return torch.bincount(pairs % num_homes, minlength=num_homes).tolist()


def _counts(topology: Topology, config: ExpertParallelConfig) -> Counter[Link]:
    links: Counter[Link] = Counter()
    everybody = range(topology.num_ranks)
    for source in everybody:
        for target in everybody:
            if source == target:
                continue
            if config.ranks_per_node is None:
                links["counts", source, target] = _COUNT_BYTES
            elif not topology.crosses(source, target):
                links["counts inside", source, target] = _COUNT_BYTES
            elif topology.gateway(source, topology.node_of(target)) == target:
                links["counts across", source, target] = _COUNT_BYTES
    return links


def network_bytes(links: Mapping[Link, int], topology: Topology) -> tuple[int, int]:
    """Bytes that stay inside nodes, and bytes between nodes."""
    totals = [0, 0]
    for (_, source, target), num_bytes in links.items():
        totals[topology.crosses(source, target)] += num_bytes
    return totals[0], totals[1]


@dataclass(frozen=True)
class LinkSpeeds:
    """Rates of a rank's port in GB/s (10⁹ bytes) and latencies in s, inside and between nodes."""

    node_GBps: float
    network_GBps: float
    node_latency_s: float = 0.0
    network_latency_s: float = 0.0


def least_time_s(
    links: Mapping[Link, int], topology: Topology, speeds: LinkSpeeds
) -> dict[str, float]:
    """Modelled time of each phase in s: the busiest port and one latency; no queueing.

    A rank has one port out and one port in for its node, and one of each for the network.
    """
    ports: defaultdict[tuple[str, str, int, bool], float] = defaultdict(float)
    latency_s: defaultdict[str, float] = defaultdict(float)
    for (what, source, target), num_bytes in links.items():
        far = topology.crosses(source, target)
        seconds = num_bytes / 1e9 / (speeds.network_GBps if far else speeds.node_GBps)
        ports[what, "out", source, far] += seconds
        ports[what, "in", target, far] += seconds
        waits_s = speeds.network_latency_s if far else speeds.node_latency_s
        latency_s[what] = max(latency_s[what], waits_s)
    busiest_s: dict[str, float] = {}
    for (what, *_), seconds in ports.items():
        busiest_s[what] = max(busiest_s.get(what, 0.0), seconds)
    return {what: busiest_s[what] + latency_s[what] for what in ORDER if what in busiest_s}


def time_on_fabric(
    links: Mapping[Link, int],
    num_ranks: int,
    send: Callable[[tuple[int, int], int], float],
    advance_to: Callable[[float], None],
    start_s: float = 0.0,
) -> dict[str, float]:
    """Modelled time of each phase in s on a fabric that queues.

    Args:
        send: models a message (from, to), bytes that is sent now; returns when it has arrived.
        advance_to: moves the fabric's clock. Phases wait for each other.
        start_s: what the clock shows.
    """
    phases: dict[str, float] = {}
    now_s = start_s
    for what in ORDER:
        arrivals = [now_s]
        # Everybody starts with the next rank, not all with rank 0.
        for offset in range(1, num_ranks):
            for source in range(num_ranks):
                target = (source + offset) % num_ranks
                num_bytes = links.get((what, source, target), 0)
                if num_bytes:
                    arrivals.append(send((source, target), num_bytes))
        if len(arrivals) > 1:
            phases[what] = max(arrivals) - now_s
            now_s = max(arrivals)
            advance_to(now_s)
    return phases
