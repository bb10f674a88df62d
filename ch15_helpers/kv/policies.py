"""Which block to give up: LRU, LFU, FIFO and a cost-aware policy behind one interface.

Cost-aware is GreedyDual-Size (Cao & Irani, USITS 1997): a block is worth the seconds that it saves
per byte that it takes, and what has not been used lately loses its worth as others are evicted.
Worth differs between blocks because attention makes a block deep in a prompt dearer to recompute.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

Worth = tuple[float, int]
"""Smaller goes first. The second part, a count of uses, decides between equals and is unique."""


@dataclass(frozen=True)
class RecomputeCost:
    """Seconds to compute tokens again; policies only compare, so the unit is free.

    Attributes:
        token_s: for each token.
        pair_s: for each (query, key) pair of attention; it makes deep blocks dear.
    """

    token_s: float = 1.0
    pair_s: float = 0.0

    def block_s(self, depth: int, block_size: int) -> float:
        """For the full block with ``depth`` blocks before it."""
        pairs = block_size * depth * block_size + block_size * (block_size + 1) // 2
        return self.token_s * block_size + self.pair_s * pairs


class EvictionPolicy(Protocol):
    """What a cache asks. Keys are any hashables; each is known from ``insert`` to ``remove``.

    Pinned keys keep their history but are never the victim: blocks in use, and blocks that
    others stand on.
    """

    name: str

    def insert(
        self, key: Hashable, *, cost_s: float = 0.0, nbytes: int = 1, pinned: bool = False
    ) -> None:
        """A key that was not known is now resident; ``cost_s`` is the time to make it again."""

    def touch(self, key: Hashable) -> None:
        """The key was used."""

    def remove(self, key: Hashable) -> None:
        """Forget the key. Raises KeyError when it is not known."""

    def pin(self, key: Hashable) -> None:
        """Never choose this key until ``unpin``; pins do not add up."""

    def unpin(self, key: Hashable) -> None:
        """The key may be chosen again."""

    def victim(self) -> Hashable:
        """The key to give up next; it stays known. Raises LookupError when all are pinned."""

    def __len__(self) -> int:
        """Keys that are known."""


class _Entry:
    __slots__ = ("gain", "pinned", "queued", "uses", "worth")

    def __init__(self, gain: float, pinned: bool) -> None:
        self.gain = gain  # seconds per byte
        self.pinned = pinned
        self.queued = False  # in the heap, perhaps with a worth that has grown since
        self.uses = 0
        self.worth: Worth = (0.0, 0)


class HeapPolicy:
    """Gives up the key of least worth; a subclass says what worth is.

    Worth only grows, so a heap entry that is out of date is too small: it comes to the top early
    and is put right there. ``touch`` and ``pin`` are O(1), ``insert``, ``unpin`` and ``victim``
    O(log n) amortised.
    """

    name = ""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._heap: list[tuple[Worth, Hashable, _Entry]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def insert(
        self, key: Hashable, *, cost_s: float = 0.0, nbytes: int = 1, pinned: bool = False
    ) -> None:
        """A key that was not known is now resident.

        Raises:
            ValueError: the key is known already, or cost or size make no sense.
        """
        if key in self._entries:
            raise ValueError(f"{key!r} is in the cache already; touch it instead")
        if cost_s < 0 or nbytes < 1:
            raise ValueError(f"cost_s must be >= 0 and nbytes >= 1, got {cost_s} and {nbytes}")
        entry = self._entries[key] = _Entry(cost_s / nbytes, pinned)
        self._tick += 1
        entry.worth = self._worth(entry, self._tick)
        if not pinned:
            self._push(key, entry)

    def touch(self, key: Hashable) -> None:
        """The key was used."""
        entry = self._entries[key]
        entry.uses += 1
        self._tick += 1
        entry.worth = self._worth(entry, self._tick)

    def remove(self, key: Hashable) -> None:
        """Forget the key, wherever it stands."""
        entry = self._entries.pop(key)
        entry.pinned = True  # what is left of it in the heap is passed over
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [item for item in self._heap if self._entries.get(item[1]) is item[2]]
            heapq.heapify(self._heap)

    def pin(self, key: Hashable) -> None:
        """Never choose this key until ``unpin``."""
        self._entries[key].pinned = True

    def unpin(self, key: Hashable) -> None:
        """The key may be chosen again."""
        entry = self._entries[key]
        entry.pinned = False
        if not entry.queued:
            self._push(key, entry)

    def victim(self) -> Hashable:
        """The key of least worth that is not pinned. Raises LookupError when there is none."""
        heap = self._heap
        while heap:
            worth, key, entry = heap[0]
            if entry.pinned:
                heapq.heappop(heap)
                entry.queued = False
            elif entry.worth != worth:
                heapq.heapreplace(heap, (entry.worth, key, entry))
            else:
                self._chosen(entry)
                return key
        raise LookupError("nothing can be evicted: the cache is empty, or all of it is in use")

    def check_invariants(self) -> None:
        """Raise AssertionError unless every key that is not pinned is in the heap, once."""
        queued = [key for _, key, entry in self._heap if self._entries.get(key) is entry]
        assert len(queued) == len(set(queued)), "a key is twice in the heap"
        for key, entry in self._entries.items():
            assert entry.queued == (key in set(queued)), f"{key!r}: queued flag is wrong"
            assert entry.pinned or entry.queued, f"{key!r} can never be evicted"

    def _push(self, key: Hashable, entry: _Entry) -> None:
        entry.queued = True
        heapq.heappush(self._heap, (entry.worth, key, entry))

    def _worth(self, entry: _Entry, tick: int) -> Worth:
        raise AssertionError(f"{type(self).__name__} does not say what a key is worth")

    def _chosen(self, entry: _Entry) -> None:
        """Called with the entry that ``victim`` is about to return."""


class LRU(HeapPolicy):
    """The one whose last use is longest ago."""

    name = "lru"

    def _worth(self, entry: _Entry, tick: int) -> Worth:
        return 0.0, tick


class FIFO(HeapPolicy):
    """The one that came first, used or not."""

    name = "fifo"

    def _worth(self, entry: _Entry, tick: int) -> Worth:
        return entry.worth if entry.uses else (0.0, tick)


class LFU(HeapPolicy):
    """The one used least often; the longest unused of those. It never forgets a past success."""

    name = "lfu"

    def _worth(self, entry: _Entry, tick: int) -> Worth:
        return float(entry.uses), tick


class CostAware(HeapPolicy):
    """GreedyDual-Size: seconds saved per byte, plus the worth of the last victim when last used."""

    name = "cost_aware"

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _worth(self, entry: _Entry, tick: int) -> Worth:
        return self._age + entry.gain, tick

    def _chosen(self, entry: _Entry) -> None:
        self._age = max(self._age, entry.worth[0])


_POLICIES: tuple[Callable[[], HeapPolicy], ...] = (LRU, LFU, FIFO, CostAware)
EVICTION_POLICIES = ("lru", "lfu", "fifo", "cost_aware")


def make_eviction_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """A policy by name, or the given object as it is.

    Raises:
        ValueError: no policy has this name; lists those that exist.
    """
    if not isinstance(policy, str):
        return policy
    for kind, name in zip(_POLICIES, EVICTION_POLICIES, strict=True):
        if name == policy:
            return kind()
    raise ValueError(
        f"unknown eviction policy {policy!r}; choose one of {', '.join(EVICTION_POLICIES)}"
    )
