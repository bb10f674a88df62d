"""Expert load balancing with redundant experts: who gets a replica, and which rank holds what.

The two steps and the hierarchical variant are DeepSeek's EPLB (2025): give each spare slot to the
expert with the most load per replica, then pack slots onto ranks, heaviest first. Two things are
added: swaps after packing, which bound the result, and a comparison with what is there already,
so that balancing never makes the given loads worse.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.placement import EMPTY, ExpertPlacement


def replicate(loads: Sequence[float], num_slots: int) -> list[int]:
    """Replicas of each expert, adding up to ``num_slots``: greedy, and best possible.

    No other numbers of replicas have a smaller largest load per replica.

    Raises:
        MoEError: fewer slots than experts, or a load that is negative or not finite.
    """
    if num_slots < len(loads):
        raise MoEError(f"{num_slots} slots cannot hold {len(loads)} experts")
    if not all(0 <= load < float("inf") for load in loads):
        raise MoEError("loads must be finite numbers that are not negative")
    replicas = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        _, expert = heap[0]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-loads[expert] / replicas[expert], expert))
    return replicas


def pack(weights: Sequence[float], num_bins: int) -> list[list[int]]:
    """Items in bins of equal number, with even sums: heaviest first, then swaps.

    When no swap between the fullest and the emptiest bin helps, their sums differ by no more than
    the heaviest item weighs more than the lightest: so the largest sum is at most the mean plus
    that difference.

    Returns:
        Items of each bin, ascending.

    Raises:
        MoEError: the number of items is not a multiple of ``num_bins``.
    """
    size, rest = divmod(len(weights), num_bins)
    if rest:
        raise MoEError(f"{len(weights)} items do not fill {num_bins} bins evenly")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, index) for index in range(num_bins)]
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        total, index = heapq.heappop(heap)
        bins[index].append(item)
        if len(bins[index]) < size:
            heapq.heappush(heap, (total + weights[item], index))
    while _swap(weights, bins):
        pass
    return [sorted(items) for items in bins]


def _swap(weights: Sequence[float], bins: list[list[int]]) -> bool:
    """Make the best swap between the fullest and the emptiest bin; False when none helps."""
    sums = [sum(weights[i] for i in items) for items in bins]
    high, low = sums.index(max(sums)), sums.index(min(sums))
    gap = sums[high] - sums[low]
    gains = np.subtract.outer([weights[i] for i in bins[high]], [weights[i] for i in bins[low]])
    # A difference d moves the pair's larger sum by d, as long as 0 < d < gap.
    best = np.minimum(gains, gap - gains)
    a, b = np.unravel_index(int(best.argmax()), best.shape)
    if best[a, b] <= 1e-9 * max(sums[high], 1e-300):
        return False
    bins[high][a], bins[low][b] = bins[low][b], bins[high][a]
    return True


def rank_loads(loads: Sequence[float], placement: ExpertPlacement) -> list[float]:
    """Load of each rank when an expert's load is shared evenly by its replicas."""
    share = [load / len(s) for load, s in zip(loads, placement.replicas, strict=True)]
    return [sum(share[e] for e in row if e != EMPTY) for row in placement.slots]


def imbalance(loads: Sequence[float], placement: ExpertPlacement) -> float:
    """Load of the busiest rank over the mean; 1 is even, and no load at all counts as even."""
    ranks = rank_loads(loads, placement)
    total = sum(ranks)
    return max(ranks) * len(ranks) / total if total else 1.0


def balance_greedy(
    loads: Sequence[float],
    num_ranks: int,
    slots_per_rank: int,
    current: ExpertPlacement | None = None,
) -> ExpertPlacement:
    """Spread experts and their replicas over all ranks, whatever their nodes.

    Args:
        loads: of each expert, e.g. tokens of the last minutes.
        current: stays if it is as good for these loads; None is the even placement.
    """
    return balance_hierarchical(loads, num_ranks, slots_per_rank, num_ranks, 1, current)


def balance_hierarchical(
    loads: Sequence[float],
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int,
    num_groups: int | None = None,
    current: ExpertPlacement | None = None,
) -> ExpertPlacement:
    """Spread groups over nodes, replicate inside each node, then spread over its ranks.

    A group of consecutive experts stays in one node, so a router that limits a token to few groups
    (DeepSeek-V3) sends it to few nodes.

    Args:
        loads: of each expert.
        num_groups: groups of the router; None makes one for each node.
        current: stays if it is as good for these loads; None is the even placement.

    Raises:
        MoEError: sizes that do not divide, or too few slots.
    """
    num_nodes, rest = divmod(num_ranks, ranks_per_node)
    num_groups = num_groups or num_nodes
    num_experts = len(loads)
    group_size, odd = divmod(num_experts, num_groups)
    if rest or odd or num_groups % num_nodes:
        raise MoEError(
            f"{num_ranks} ranks in nodes of {ranks_per_node} and {num_experts} experts in "
            f"{num_groups} groups: nodes must divide ranks and groups, groups must divide experts"
        )
    groups = [list(range(i * group_size, (i + 1) * group_size)) for i in range(num_groups)]
    group_loads = [sum(loads[e] for e in group) for group in groups]
    rows: list[tuple[int, ...]] = []
    for chosen in pack(group_loads, num_nodes):
        experts = [e for group in chosen for e in groups[group]]
        rows += fill_node(experts, loads, ranks_per_node, slots_per_rank)
    found = ExpertPlacement(num_experts, tuple(rows))
    if current is None:
        current = ExpertPlacement.even(num_experts, num_ranks, slots_per_rank)
    return found if imbalance(loads, found) < imbalance(loads, current) else current


def fill_node(
    experts: Sequence[int], loads: Sequence[float], num_ranks: int, slots_per_rank: int
) -> list[tuple[int, ...]]:
    """Experts and their replicas on the ranks of one node: [num_ranks][slots_per_rank]."""
    replicas = replicate([loads[e] for e in experts], num_ranks * slots_per_rank)
    slots = [e for e, count in zip(experts, replicas, strict=True) for _ in range(count)]
    number = dict(zip(experts, replicas, strict=True))
    packed = pack([loads[e] / number[e] for e in slots], num_ranks)
    return [tuple(slots[i] for i in items) for items in packed]
