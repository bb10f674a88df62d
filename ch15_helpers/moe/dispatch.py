"""Dispatch and combine: copies of tokens go to the ranks of their experts, sums come back.

One all-to-all of counts, one of rows there, one of results back, as in GShard (2020) and DeepEP
(2025). With deduplication a token goes to a destination once, however many of its experts live
there, and comes back as one weighted sum. A destination is a rank, or a node of several ranks
(see ``topology``). All tables are sized by tokens times top k, or by destinations.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.dispatch import use_triton
from ch15_helpers.kernels.moe_permute import sort_by_expert
from ch15_helpers.moe.device_copies import (
    DeviceCopies,
    make_device_copies,
    sum_device_copies,
)
from ch15_helpers.moe.modelled_link import ModelledLink, hold_until
from ch15_helpers.moe.wire import WireFormat

_TILE = 1 << 20  # tiles of the order are not used here: as few as possible

Link = tuple[str, int, int]
"""What travels ("counts", "dispatch", "combine", with its level); ranks of the world: from, to."""


@dataclass(frozen=True)
class Copies:
    """Copies of tokens, sorted by destination; the host does not know yet how many.

    Attributes:
        tokens: int64 [at least C], token of each copy.
        positions: int64 [num_tokens, k], places of a token's copies, -1 where there is none.
        slots: int64 [at least C, entries], slots at the destination, -1 for none.
        weights: float32 [at least C, entries].
        counts: int64 [num_destinations], copies for each.
        valid: bool [rows] where each destination has a fixed number of rows: not padding.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    weights: Tensor
    counts: Tensor
    valid: Tensor | None = None


def make_copies(
    slots: Tensor,
    weights: Tensor,
    slots_per_destination: int,
    num_destinations: int,
    dedup: bool,
    fixed_rows: int | None = None,
) -> Copies:
    """Which copies a batch needs; nothing here waits for the host.

    Args:
        slots: int64 [num_tokens, k], global slots; -1 goes nowhere.
        weights: float32 [num_tokens, k].
        dedup: one copy for each (token, destination), else one for each (token, slot).
        fixed_rows: rows of each destination, padded; at least as many as there can be copies.
    """
    top_k = slots.shape[1]
    home = slots.div(slots_per_destination, rounding_mode="floor")  # -1 stays -1
    if dedup:
        home = home.sort(dim=-1).values
        repeated = torch.zeros_like(home, dtype=torch.bool)
        repeated[:, 1:] = home[:, 1:] == home[:, :-1]
        home = home.masked_fill(repeated, -1)
    flat = home.flatten()
    counts = torch.zeros(num_destinations + 1, dtype=torch.int64, device=slots.device)
    keys = torch.where(flat < 0, num_destinations, flat)
    counts = counts.scatter_add_(0, keys, torch.ones_like(keys))[:-1]
    order = sort_by_expert(home.contiguous(), num_destinations, 1, _TILE)
    # Past the end the order is undefined: any valid pair will do until the rows are cut off.
    pairs = order.rows.long().clamp(0, max(0, flat.numel() - 1))
    positions, valid = order.positions.long(), None
    if fixed_rows is not None:
        pairs, positions, valid = _spread(pairs, positions, flat, counts, fixed_rows)
    if not flat.numel():
        rows = len(pairs)
        nothing = slots.new_full((rows, top_k if dedup else 1), -1)
        return Copies(pairs, positions.view(slots.shape), nothing, nothing.float(), counts, valid)
    tokens = pairs.div(top_k, rounding_mode="floor")
    if dedup:
        first = (flat[pairs] * slots_per_destination)[:, None]
        local = slots[tokens] - first
        entries = torch.where((local >= 0) & (local < slots_per_destination), local, -1)
        factors = weights[tokens]
    else:
        entries = slots.flatten()[pairs, None].remainder(slots_per_destination)
        factors = weights.flatten()[pairs, None]
    if valid is not None:
        entries = torch.where(valid[:, None], entries, -1)
    return Copies(tokens, positions.view(slots.shape), entries, factors, counts, valid)


def _spread(
    pairs: Tensor, positions: Tensor, homes: Tensor, counts: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The order with ``rows`` rows for each destination, and which of them are not padding."""
    starts = counts.cumsum(0) - counts
    lane = torch.arange(len(counts) * rows, device=counts.device)
    home, index = lane.div(rows, rounding_mode="floor"), lane.remainder(rows)
    valid = index < counts[home]
    if not len(pairs):
        return torch.zeros_like(lane), positions, valid
    padded = pairs[(starts[home] + index).clamp(max=len(pairs) - 1)]
    known = homes.clamp(min=0)
    moved = positions - starts[known] + known * rows
    return padded, torch.where(positions < 0, -1, moved), valid


def sum_copies(rows: Tensor, copies: Copies, dtype: torch.dtype) -> Tensor:
    """Each token's results added up in order of destination: [num_tokens, hidden].

    Args:
        rows: [C, hidden], results in the order of the copies. A token without copies gets zeros.
    """
    num_tokens, hidden = copies.positions.shape[0], rows.shape[1]
    out = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=rows.device)
    tokens = copies.tokens[: len(rows)]
    if copies.valid is not None:
        tokens, rows = tokens[copies.valid], rows[copies.valid]
    return out.index_add_(0, tokens, rows.float()).to(dtype)


class Pending:
    """Rows on their way: what a started all-to-all will have received."""

    def __init__(self, out: Tensor, sent: Tensor, work: Any, due_s: float = 0.0) -> None:
        """Held back until ``time.perf_counter`` shows ``due_s``, where a link is modelled."""
        self._out, self._work, self._due_s = out, work, due_s
        self._sent: Tensor | None = sent  # must live until the transfer is over

    def wait(self) -> Tensor:
        """The received rows; on CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = self._sent = None
        hold_until(self._due_s)
        return self._out


class Exchange:
    """All-to-all between the ranks of a group, counting what it puts on each link.

    Attributes:
        rank, size: in the group. ranks: the group's members as ranks of the world.
        link_bytes: bytes that this rank sent to others, by :data:`Link`; what stays is no link's.
        link: modelled, holds back what arrives (CPU ranks: it is the host that waits); or None.
    """

    def __init__(self, group: Any = None, level: str = "") -> None:
        """``level`` is added to the name of what travels, where there is more than one."""
        if not dist.is_initialized():
            raise MoEError(
                "expert parallelism needs torch.distributed: start the ranks with torchrun or "
                "ch15_helpers.moe.launch, which call init_process_group"
            )
        self.group, self._level = group, level
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.link_bytes: Counter[Link] = Counter()
        self.link: ModelledLink | None = None
        self._port_free_s = 0.0

    def counts(self, counts: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Trade counts [size, num_batches]: those sent and those received, by batch.

        The one place where the host waits: message sizes must be known to it.
        """
        counts = counts.contiguous()
        received = torch.empty_like(counts)
        # So few bytes pass between the packets of a long message: they do not queue behind it.
        one = [1] * self.size
        due_s = self._due_s(one, one, counts[0].nbytes, queue=False)
        dist.all_to_all_single(received, counts, group=self.group)
        self._count("counts", [1] * self.size, counts[0].nbytes)
        hold_until(due_s)
        both = torch.stack((counts, received)).transpose(1, 2).tolist()
        return both[0], both[1]

    def start(
        self, what: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Pending:
        """Start sending ``sent[i]`` rows to rank i, in order, and receiving ``received[i]``."""
        row_bytes = rows.shape[1] * rows.element_size()
        self._count(what, sent, row_bytes)
        out = rows.new_empty((sum(received), rows.shape[1]))
        due_s = self._due_s(sent, received, row_bytes)
        bytes_out, bytes_in = out.view(torch.uint8), rows.contiguous().view(torch.uint8)
        work = dist.all_to_all_single(
            bytes_out, bytes_in, list(received), list(sent), group=self.group, async_op=True
        )
        return Pending(out, bytes_in, work, due_s)

    def _due_s(
        self, sent: Sequence[int], received: Sequence[int], row_bytes: int, queue: bool = True
    ) -> float:
        """When the modelled link is done, were all ranks to start now; 0 without one."""
        if self.link is None:
            return 0.0
        sizes = ([rows * row_bytes for rows in way] for way in (sent, received))
        latency_s, wire_s = self.link.cost_s(self.ranks[self.rank], self.ranks, *sizes)
        start_s = time.perf_counter()
        if not queue:
            return start_s + wire_s + latency_s
        # Messages queue at the port; latencies overlap.
        self._port_free_s = max(start_s, self._port_free_s) + wire_s
        return self._port_free_s + latency_s

    def _count(self, what: str, rows: Sequence[int], row_bytes: int) -> None:
        me = self.ranks[self.rank]
        for peer, count in enumerate(rows):
            if peer != self.rank and count:
                self.link_bytes[what + self._level, me, self.ranks[peer]] += count * row_bytes


@dataclass(frozen=True)
class Trip:
    """Copies of one batch with the counts that the ranks have agreed on.

    Attributes:
        sent, received: rows to and from each rank of the group.
    """

    copies: Copies | DeviceCopies
    sent: list[int]
    received: list[int]


class Dispatcher:
    """Sends tokens to destinations and brings their results back, in phases that may overlap.

    Args:
        exchange: the group; each of its ranks is a destination.
        slots_per_destination: see :func:`make_copies`.
        wire: layout of the rows; ``entries`` is the router's top k, or 1 without deduplication.
        combine_dtype: type in which results travel back.
        fixed_rows: each message has so many rows, and no counts are traded: nothing waits for the
            host. Needs ``dedup``, and no batch may have more tokens than that. Batches that are
            planned together share them.
    """

    def __init__(
        self,
        exchange: Exchange,
        slots_per_destination: int,
        wire: WireFormat,
        combine_dtype: torch.dtype,
        dedup: bool = True,
        fixed_rows: int | None = None,
    ) -> None:
        self.exchange, self.wire, self.dedup = exchange, wire, dedup
        self.fixed_rows = fixed_rows
        self._size, self._combine_dtype = slots_per_destination, combine_dtype

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on its way back, and on its way out."""
        return self.wire.hidden * self._combine_dtype.itemsize, self.wire.row_bytes

    def plan(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Trip]:
        """Agree on the counts of some batches at once: (weights, global slots) of each."""
        fixed, size = self.fixed_rows, self.exchange.size
        if fixed is not None:  # as if one batch had been cut
            fixed = -(-fixed // max(1, len(batches)))
        most = max((len(slots) for _, slots in batches), default=0)
        if fixed is not None and most > fixed:
            raise MoEError(f"a batch has {most} tokens, messages are made for {fixed}")
        narrow = self.wire.dtype.itemsize <= 4  # kernels add in float32
        fused = narrow and all(use_triton(slots) for _, slots in batches)
        make: Callable[..., Copies | DeviceCopies] = make_device_copies if fused else make_copies
        made = [
            make(slots, weights, self._size, size, self.dedup, fixed) for weights, slots in batches
        ]
        if fixed is not None:
            return [Trip(copies, [fixed] * size, [fixed] * size) for copies in made]
        counts = [c.counts for c in made if c.counts is not None]
        sent, received = self.exchange.counts(torch.stack(counts, dim=1))
        return [Trip(*parts) for parts in zip(made, sent, received, strict=True)]

    def start_dispatch(self, x: Tensor, trip: Trip) -> Pending:
        """Pack [num_tokens, hidden] and send; what arrives is for :meth:`unpack`."""
        copies, num_rows = trip.copies, sum(trip.sent)
        source = x if len(x) else x.new_zeros(1, x.shape[1])  # padding of an empty batch
        if isinstance(copies, DeviceCopies):
            packed = self.wire.pack(source, copies, num_rows)
        else:
            chosen = (part[:num_rows] for part in (copies.tokens, copies.slots, copies.weights))
            packed = self.wire.encode(source, *chosen)
        return self.exchange.start("dispatch", packed, trip.sent, trip.received)

    def unpack(self, arrived: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [R, hidden], weights and this destination's slots [R, entries]."""
        rows, slots, weights = self.wire.decode(arrived, dtype)
        return rows, weights, slots

    def start_combine(self, results: Tensor, trip: Trip) -> Pending:
        """Send results [R, hidden], in the order of what arrived, back to their sources."""
        rows = results.to(self._combine_dtype)
        return self.exchange.start("combine", rows, trip.received, trip.sent)

    def finish(self, returned: Tensor, trip: Trip, dtype: torch.dtype) -> Tensor:
        """[num_tokens, hidden] of the results that came back."""
        if isinstance(trip.copies, DeviceCopies):
            return sum_device_copies(returned, trip.copies, dtype)
        return sum_copies(returned, trip.copies, dtype)
