"""Brings the blocks of a transfer back to the device, from memory tiers and from those below."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ch15_helpers.kv.backing import Backing
from ch15_helpers.kv.mover import Mover
from ch15_helpers.kv.ticket import Ticket
from ch15_helpers.kv.tier_config import TierStats
from ch15_helpers.kv.tier_index import Entry
from ch15_helpers.kv.tier_memory import MemoryTier, MemoryTiers
from ch15_helpers.kv.transfer import Transfer

Found = tuple[int, MemoryTier, Entry]
"""(place in the transfer, tier, pinned entry)"""


class Promoter:
    """The copies of ``TieredStore.promote``; it decides nothing and locks nothing.

    What a file or a peer process gives goes through one of two buffers of ``batch`` blocks, so
    that reading the next ones overlaps with copying the last ones to the device.
    """

    def __init__(
        self, mover: Mover, memory: MemoryTiers, backing: Backing, stats: TierStats, batch: int
    ) -> None:
        self._mover, self._memory, self._backing, self._stats = mover, memory, backing, stats
        self._batch = batch
        self._buffers = [mover.new_rows(batch) for _ in range(2)] if backing else []
        self._emptied = [Ticket(), Ticket()]
        self._counting = threading.Lock()  # two threads may start copies of one transfer

    @torch.inference_mode()
    def from_memory(self, transfer: Transfer, held: Sequence[Found], fence: Ticket) -> None:
        """Start the copies of blocks that are in memory."""
        for tier in self._memory.tiers:
            mine = [(i, entry) for i, where, entry in held if where is tier]
            if not mine:
                continue
            places, slots = [i for i, _ in mine], [entry.slot for _, entry in mine]
            if not tier.alive():
                continue
            after = {id(e.ticket): e.ticket for _, e in mine if e.ticket is not None}
            blocks = [transfer.pairs[i][1] for i in places]
            try:
                ticket = self._mover.load(tier.rows, slots, blocks, [fence, *after.values()])
            except RuntimeError as error:  # torch raises nothing else, for CUDA too
                self._memory.fault("copy failed", error)
                continue
            transfer.needs(places, tier.alive)
            self._account(transfer, places, [tier.name] * len(places), ticket)

    @torch.inference_mode()
    def run(
        self, transfer: Transfer, held: Sequence[Found], below: Sequence[int], fence: Ticket
    ) -> None:
        """In the reader's thread: start all copies. Starting them takes the host a while, which
        the thread that launches the model does not have."""
        try:
            self.from_memory(transfer, held, fence)
            for number, start in enumerate(range(0, len(below), self._batch)):
                self._from_below(transfer, below[start : start + self._batch], fence, number % 2)
        finally:
            transfer.issued()

    def _from_below(
        self, transfer: Transfer, places: Sequence[int], fence: Ticket, half: int
    ) -> None:
        buffer = self._buffers[half]
        rows = list(buffer.numpy())
        try:
            self._emptied[half].wait()
            names = self._backing.read([transfer.pairs[i][0] for i in places], rows)
            good = [slot for slot, name in enumerate(names) if name is not None]
            if not good:
                return
            blocks = [transfer.pairs[places[slot]][1] for slot in good]
            ticket = self._emptied[half] = self._mover.load(buffer, good, blocks, [fence])
        except RuntimeError as error:
            self._memory.fault("copy failed", error)
            return
        found = [names[slot] or "" for slot in good]
        self._account(transfer, [places[slot] for slot in good], found, ticket)

    def _account(
        self, transfer: Transfer, places: Sequence[int], names: Sequence[str], ticket: Ticket
    ) -> None:
        num_bytes = len(places) * self._memory.tiers[0].rows.shape[1]
        with self._counting:
            transfer.add(ticket)
            for place, name in zip(places, names, strict=True):
                transfer.ok[place] = True
                transfer.tiers[place] = name
            self._stats.promoted.update(names)
            transfer.num_bytes += num_bytes
            self._stats.promoted_bytes += num_bytes
