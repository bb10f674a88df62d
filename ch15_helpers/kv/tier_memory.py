"""The tiers that the mover reaches by itself: memory of a peer device, and RAM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.kv.mover import Mover
from ch15_helpers.kv.tier_config import TierStats
from ch15_helpers.kv.tier_index import Entry, SlotIndex

logger = logging.getLogger(__name__)


class MemoryTier:
    """Index and rows, uint8 [slots, payload bytes].

    ``alive`` says whether their owner is there; a tier that was ``lost`` holds nothing any more.
    """

    def __init__(
        self, name: str, rows: Tensor, policy: str, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self.name = name
        self.alive = alive
        self.lost = False
        self.rows = rows
        self.index = SlotIndex(len(rows), policy, rows.shape[1])


class MemoryTiers:
    """One to two memory tiers, highest first. Not thread-safe: the store locks.

    ``has_backing`` says that there are tiers below, so that a block given up unsaved is a loss
    that could have been avoided, and is counted as dropped.
    """

    def __init__(
        self,
        tiers: Sequence[MemoryTier],
        mover: Mover,
        stats: TierStats,
        recompute_s: Callable[[BlockKey], float],
        has_backing: bool,
    ) -> None:
        self.tiers = list(tiers)
        self._mover = mover
        self._stats = stats
        self._recompute_s = recompute_s
        self._has_backing = has_backing

    def find(self, key: BlockKey) -> tuple[MemoryTier, Entry] | None:
        """The highest tier with this block, and its entry."""
        for tier in self.tiers:
            entry = tier.index.get(key)
            if entry is not None:
                return tier, entry
        return None

    def store(self, pairs: Sequence[tuple[int, BlockKey]]) -> None:
        """Copy device blocks into the highest tier; what is in memory already is only touched."""
        level = next((i for i, tier in enumerate(self.tiers) if not tier.lost), None)
        if level is None:
            self._stats.dropped += len(pairs)
            return
        top = self.tiers[level]
        new: list[tuple[int, Entry]] = []
        for block, key in pairs:
            present = self.find(key)
            if present is not None:
                present[0].index.touch(present[1])
                continue
            entry = self._take_slot(level, key)
            if entry is None:
                self._stats.dropped += 1
            else:
                top.index.pin(entry)  # not a victim of its own batch
                new.append((block, entry))
        if not new:
            return
        slots = [entry.slot for _, entry in new]
        try:
            ticket = self._mover.store([block for block, _ in new], top.rows, slots)
        except RuntimeError as error:  # torch raises nothing else, for CUDA too
            self.fault("copy failed", error)
            for _, entry in new:
                top.index.unpin(entry)
                top.index.drop(entry)
            return
        for _, entry in new:
            entry.ticket = ticket
            top.index.unpin(entry)
        self._stats.demoted += len(new)
        self._stats.demoted_bytes += len(new) * top.rows.shape[1]

    def see_losses(self) -> None:
        """Forget what lies in memory whose owner has ended."""
        for tier in self.tiers:
            if not tier.lost and not tier.alive():
                tier.lost = True
                for entry in list(tier.index):
                    tier.index.drop(entry)
                self.fault("peer lost", RuntimeError("the process that owned them has ended"))

    def fault(self, reason: str, error: Exception) -> None:
        """Count what went wrong; the block is a miss from now on."""
        self._stats.faults[reason] += 1
        logger.warning("KV blocks are given up, %s: %s", reason, error)

    def check_invariants(self) -> None:
        """Raise AssertionError when an index is inconsistent."""
        for tier in self.tiers:
            tier.index.check_invariants()

    def _take_slot(self, level: int, key: BlockKey) -> Entry | None:
        """A slot for this key; the coldest block goes down one tier, or is given up."""
        index = self.tiers[level].index
        if not index.room():
            victim = index.coldest()
            if victim is None:
                return None
            self._spill(level, victim)
            index.drop(victim)
        return index.add(key, self._recompute_s(key))

    def _spill(self, level: int, victim: Entry) -> None:
        if level + 1 == len(self.tiers):
            self._stats.dropped += self._has_backing and not victim.saved
            return
        tier, below = self.tiers[level], self.tiers[level + 1]
        if victim.key in below.index:
            return
        entry = self._take_slot(level + 1, victim.key)
        if entry is None:
            self._stats.dropped += 1
            return
        try:
            entry.ticket = self._mover.copy_rows(tier.rows, [victim.slot], below.rows, [entry.slot])
            self._stats.written[below.name] += 1
        except RuntimeError as error:
            self.fault("copy failed", error)
            below.index.drop(entry)
