"""Changing a placement while it serves: what has to move, how long that stalls, what it gains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.balancing import balance_hierarchical, imbalance, rank_loads
from ch15_helpers.moe.expert_parallel import ExpertParallel
from ch15_helpers.moe.experts import ExpertWeights
from ch15_helpers.moe.placement import EMPTY, ExpertPlacement


@dataclass(frozen=True, slots=True)
class Move:
    """One expert's weights from a rank's slot to another rank's slot (global numbers)."""

    expert: int
    source_slot: int
    target_slot: int


def keep_in_place(
    old: ExpertPlacement, new: ExpertPlacement, ranks_per_node: int | None = None
) -> ExpertPlacement:
    """``new`` with its ranks and slots renumbered so that many experts stay where they are.

    Ranks of one node are equal, so which of them gets which row is free; it goes by overlap,
    largest first. ``ranks_per_node`` is None for one node.
    """
    size = ranks_per_node or new.num_ranks
    rows: list[tuple[int, ...]] = [()] * new.num_ranks
    for first in range(0, new.num_ranks, size):
        node = range(first, first + size)
        overlap = [
            (-sum((Counter(old.slots[a]) & Counter(new.slots[b])).values()), a, b)
            for a in node
            for b in node
        ]
        taken: set[int] = set()
        for _, rank, row in sorted(overlap):
            if not rows[rank] and row not in taken:
                rows[rank] = _keep_slots(old.slots[rank], new.slots[row])
                taken.add(row)
    return ExpertPlacement(new.num_experts, tuple(rows))


def _keep_slots(old: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    left = Counter(new)
    row: list[int | None] = []
    for expert in old:
        stays = left[expert] > 0
        left[expert] -= stays
        row.append(expert if stays else None)
    rest = iter(sorted(left.elements()))
    return tuple(next(rest) if expert is None else expert for expert in row)


def plan_moves(
    old: ExpertPlacement, new: ExpertPlacement, ranks_per_node: int | None = None
) -> list[Move]:
    """The weights that must travel, each from the nearest rank that has them.

    What is on the right rank already is copied there (source and target on one rank); a slot that
    keeps its expert needs nothing.

    Raises:
        MoEError: the placements have other numbers of ranks, slots or experts.
    """
    shape = (old.num_experts, old.num_ranks, old.slots_per_rank)
    if shape != (new.num_experts, new.num_ranks, new.slots_per_rank):
        raise MoEError("both placements need the same experts, ranks and slots per rank")
    size, node = old.slots_per_rank, ranks_per_node or old.num_ranks
    held = old.replicas
    flat = [expert for row in old.slots for expert in row]
    sent: Counter[int] = Counter()
    moves = []
    for target, expert in enumerate(e for row in new.slots for e in row):
        if expert in (EMPTY, flat[target]):
            continue
        rank = target // size

        def distance(slot: int, rank: int = rank) -> tuple[bool, bool, int, int]:
            there = slot // size
            return there != rank, there // node != rank // node, sent[there], slot

        source = min(held[expert], key=distance)
        sent[source // size] += source // size != rank
        moves.append(Move(expert, source, target))
    return moves


def moved_bytes(
    moves: Sequence[Move], slots_per_rank: int, bytes_per_expert: int
) -> Counter[tuple[int, int]]:
    """Bytes over each link (from rank, to rank); copies inside a rank are no link's."""
    links: Counter[tuple[int, int]] = Counter()
    for move in moves:
        source, target = move.source_slot // slots_per_rank, move.target_slot // slots_per_rank
        if source != target:
            links[source, target] += bytes_per_expert
    return links


def stall_s(links: Counter[tuple[int, int]], port_GBps: float) -> float:
    """Modelled seconds until the busiest port (in or out) has moved its bytes."""
    ports: Counter[tuple[str, int]] = Counter()
    for (source, target), num_bytes in links.items():
        ports["out", source] += num_bytes
        ports["in", target] += num_bytes
    return max(ports.values(), default=0) / (port_GBps * 1e9)


def rebalance(parallel: ExpertParallel, new: ExpertPlacement) -> Counter[tuple[int, int]]:
    """Move weights between real ranks and serve from ``new``; all ranks call it together.

    Returns:
        Bytes that this rank sent, by link.
    """
    old, experts, exchange = parallel.placement, parallel.experts, parallel.exchange
    moves = plan_moves(old, new, parallel.config.ranks_per_node)
    size, me = old.slots_per_rank, exchange.rank
    parts = [experts.gate_up, experts.down, *(experts.scales or ())]
    fresh = [part.clone() for part in parts]
    transfers, buffers = [], []
    for move in moves:
        source, target = move.source_slot // size, move.target_slot // size
        if source == me and target != me:
            blob = _blob(parts, move.source_slot % size)
            buffers.append(blob)
            peer = exchange.ranks[target]
            transfers.append(dist.P2POp(dist.isend, blob, peer, exchange.group))
        elif target == me and source == me:
            _put(_blob(parts, move.source_slot % size), fresh, move.target_slot % size)
        elif target == me:
            blob = torch.empty_like(_blob(parts, 0))
            buffers.append(blob)
            peer = exchange.ranks[source]
            transfers.append(dist.P2POp(dist.irecv, blob, peer, exchange.group))
    works = dist.batch_isend_irecv(transfers) if transfers else []
    for work in works:
        work.wait()
    arriving = [m for m in moves if me in (m.source_slot // size, m.target_slot // size)]
    remote = [m for m in arriving if m.source_slot // size != m.target_slot // size]
    for move, blob in zip(remote, buffers, strict=True):
        if move.target_slot // size == me:
            _put(blob, fresh, move.target_slot % size)
    scales = (fresh[2], fresh[3]) if experts.scales is not None else None
    parallel.adopt(ExpertWeights(fresh[0], fresh[1], scales), new)
    links = moved_bytes(moves, size, experts.bytes_per_expert)
    return Counter({link: count for link, count in links.items() if link[0] == me})


def _blob(parts: Sequence[Tensor], slot: int) -> Tensor:
    return torch.cat([part[slot].reshape(-1).view(torch.uint8) for part in parts])


def _put(blob: Tensor, parts: Sequence[Tensor], slot: int) -> None:
    first = 0
    for part in parts:
        flat = part[slot].view(-1).view(torch.uint8)
        flat.copy_(blob[first : first + flat.numel()])
        first += flat.numel()


@dataclass(frozen=True)
class DriftRun:
    """Serving some batches with or without rebalancing. Times are modelled.

    Attributes:
        max_over_mean: busiest rank over the mean, batch by batch.
        compute_s: sum over batches of the busiest rank's work.
        stall_s: of all rebalances. moved_bytes: over all links. num_rebalances: that moved any.
    """

    max_over_mean: tuple[float, ...]
    compute_s: float
    stall_s: float
    moved_bytes: int
    num_rebalances: int

    @property
    def total_s(self) -> float:
        return self.compute_s + self.stall_s


def serve_under_drift(
    counts: Sequence[Sequence[float]],
    num_ranks: int,
    slots_per_rank: int,
    *,
    interval: int | None,
    window: int,
    s_per_pair: float,
    bytes_per_expert: int,
    port_GBps: float,
    ranks_per_node: int | None = None,
    least_gain: float = 0.0,
) -> DriftRun:
    """Serve batches of known expert loads, rebalancing on what was seen before.

    Args:
        counts: pairs of each expert in each batch [num_batches][num_experts].
        interval: rebalance before every so many batches; None keeps the even placement.
        window: batches that the loads are averaged over; only earlier ones.
        s_per_pair: time of one pair on one rank.
        least_gain: by which the busiest rank over the mean must fall, on the loads seen, for
            weights to move; loads of few tokens always look uneven.
    """
    if not counts or window < 1 or (interval is not None and interval < 1):
        raise MoEError("expected at least one batch, window ≥ 1, and interval ≥ 1 or None")
    placement = ExpertPlacement.even(len(counts[0]), num_ranks, slots_per_rank)
    node = ranks_per_node or num_ranks
    ratios, compute_s, waited_s, moved, rebalances = [], 0.0, 0.0, 0, 0
    for batch, loads in enumerate(counts):
        if interval is not None and batch and batch % interval == 0:
            seen = np.mean(np.asarray(counts[max(0, batch - window) : batch]), axis=0).tolist()
            found = balance_hierarchical(seen, num_ranks, slots_per_rank, node, current=placement)
            if imbalance(seen, placement) - imbalance(seen, found) < least_gain:
                found = placement
            found = keep_in_place(placement, found, ranks_per_node)
            links = moved_bytes(
                plan_moves(placement, found, ranks_per_node), slots_per_rank, bytes_per_expert
            )
            waited_s += stall_s(links, port_GBps)
            moved += sum(links.values())
            rebalances += bool(links)
            placement = found
        ranks = rank_loads(loads, placement)
        mean = sum(ranks) / num_ranks
        ratios.append(max(ranks) / mean if mean else 1.0)
        compute_s += max(ranks) * s_per_pair
    return DriftRun(tuple(ratios), compute_s, waited_s, moved, rebalances)
