"""The tiers that only a worker thread talks to, one below the other: peer process, then disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.kv.tier_file import Row


class BackingTier(Protocol):
    """A bounded store of rows by key. It never raises for what happens at run time: what cannot
    be written or read is False. ``contains`` may be called from any thread."""

    name: str
    num_blocks: int

    def __len__(self) -> int: ...

    def contains(self, key: BlockKey) -> bool:
        """Whether the block is expected to be there; no I/O."""

    def hand_down(
        self, count: int, unless: Callable[[BlockKey], bool]
    ) -> tuple[list[BlockKey], list[Row]]:
        """Make room for ``count`` blocks; what was given up for it, except where ``unless``."""

    def put_many(self, keys: Sequence[BlockKey], rows: Sequence[Row]) -> list[bool]:
        """Take blocks in."""

    def get_many(self, keys: Sequence[BlockKey], out: Sequence[Row]) -> list[bool]:
        """Fill rows; a row whose answer is False is undefined."""

    def close(self) -> None:
        """Let go of whatever is held. Closing twice is fine."""

    def check_invariants(self) -> None:
        """Raise AssertionError when the tier is inconsistent."""


class Backing:
    """A chain of backing tiers. One thread writes, and one other may read."""

    def __init__(self, tiers: Sequence[BackingTier], written: Counter[str]) -> None:
        self.tiers = list(tiers)
        self._written = written

    def __bool__(self) -> bool:
        return bool(self.tiers)

    def tier_of(self, key: BlockKey) -> str | None:
        """The first tier that has this block. No I/O."""
        return next((tier.name for tier in self.tiers if tier.contains(key)), None)

    def occupancy(self) -> dict[str, tuple[int, int]]:
        """Tier name to (blocks in it, most blocks)."""
        return {tier.name: (len(tier), tier.num_blocks) for tier in self.tiers}

    def write(self, keys: Sequence[BlockKey], rows: Sequence[Row], level: int = 0) -> list[bool]:
        """Put blocks into tier ``level``; what it must give up for them goes one lower.

        A block that the first tier does not take is offered to the next one.
        """
        if not keys or level >= len(self.tiers):
            return [False] * len(keys)
        tier = self.tiers[level]
        if level + 1 < len(self.tiers):
            self.write(*tier.hand_down(len(keys), self.tiers[level + 1].contains), level + 1)
        taken = tier.put_many(keys, rows)
        self._written[tier.name] += sum(taken)
        refused = [i for i, ok in enumerate(taken) if not ok]
        lower = self.write([keys[i] for i in refused], [rows[i] for i in refused], level + 1)
        for i, ok in zip(refused, lower, strict=True):
            taken[i] = ok
        return taken

    def read(self, keys: Sequence[BlockKey], rows: Sequence[Row]) -> list[str | None]:
        """Fill rows; per key the name of the tier that had it, or None."""
        found: list[str | None] = [None] * len(keys)
        for tier in self.tiers:
            wanted = [i for i, key in enumerate(keys) if found[i] is None and tier.contains(key)]
            if not wanted:
                continue
            got = tier.get_many([keys[i] for i in wanted], [rows[i] for i in wanted])
            for i, ok in zip(wanted, got, strict=True):
                found[i] = tier.name if ok else None
        return found

    def close(self) -> None:
        """Close every tier."""
        for tier in self.tiers:
            tier.close()

    def check_invariants(self) -> None:
        """Raise AssertionError when a tier is inconsistent."""
        for tier in self.tiers:
            tier.check_invariants()
