"""What a router believes to be in the replicas' prefix caches, from what it sent where.

A replica caches prompts block by block, so the index keeps names of blocks (chained: a name stands
for the block and everything before it) per replica. It is approximate on purpose: the router does
not ask replicas, it assumes that they keep what was used last, as SGLang's cache-aware router
does. A wrong guess costs a recomputed prefix, never a wrong token.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence

Key = int
"""64 bits that name a block and all blocks before it. Equal content gives equal keys; a collision
only makes the router guess wrong."""


class PrefixIndex:
    """For each replica, the blocks that it used last, least recent forgotten first.

    Whenever a block is noted, the blocks before it are noted after it, so they are forgotten
    later: what is known of a replica is always closed under prefixes.

    Attributes:
        capacity_blocks: most blocks remembered for one replica; choose the size of its KV pool.
    """

    def __init__(self, num_replicas: int, capacity_blocks: int) -> None:
        if capacity_blocks < 1:
            raise ValueError(f"capacity_blocks must be at least 1, got {capacity_blocks}")
        self.capacity_blocks = capacity_blocks
        self._recent: list[OrderedDict[Key, None]] = [OrderedDict() for _ in range(num_replicas)]
        self._holders: dict[Key, dict[int, None]] = {}

    def note(self, replica: int, keys: Sequence[Key]) -> None:
        """A prompt with these blocks, first to last, went to the replica."""
        recent, holders = self._recent[replica], self._holders
        for key in reversed(keys):
            if key in recent:
                recent.move_to_end(key)
            else:
                recent[key] = None
                holders.setdefault(key, {})[replica] = None
        while len(recent) > self.capacity_blocks:
            key, _ = recent.popitem(last=False)
            self._forget(replica, key)

    def clear(self, replica: int) -> None:
        """Its cache is gone."""
        for key in self._recent[replica]:
            self._forget(replica, key)
        self._recent[replica].clear()

    def num_blocks(self, replica: int) -> int:
        """Blocks remembered for a replica."""
        return len(self._recent[replica])

    def depth(self, keys: Sequence[Key], replica: int) -> int:
        """How many leading blocks a replica has."""
        return _leading(keys, self._recent[replica])

    def deepest(self, keys: Sequence[Key]) -> int:
        """How many leading blocks the replica with the most of them has."""
        return _leading(keys, self._holders)

    def holders(self, key: Key) -> Iterable[int]:
        """Replicas that have a block, in the order in which they got it."""
        return self._holders.get(key, {}).keys()

    def check_invariants(self) -> None:
        """Raise AssertionError when the two directions disagree or a bound is exceeded."""
        pairs = {(key, r) for r, recent in enumerate(self._recent) for key in recent}
        assert pairs == {(k, r) for k, rs in self._holders.items() for r in rs}, "sides disagree"
        assert all(self._holders.values()), "a block without a holder is kept"
        assert all(len(r) <= self.capacity_blocks for r in self._recent), "over capacity"

    def _forget(self, replica: int, key: Key) -> None:
        holders = self._holders[key]
        del holders[replica]
        if not holders:
            del self._holders[key]


def token_keys(tokens: Sequence[int], block_size: int) -> tuple[Key, ...]:
    """Keys of the full blocks of a prompt, the same in every process."""
    keys: list[Key] = []
    digest = b""
    for start in range(0, len(tokens) - block_size + 1, block_size):
        ids = struct.pack(f"<{block_size}q", *tokens[start : start + block_size])
        digest = hashlib.blake2b(digest + ids, digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
    return tuple(keys)


def segment_keys(segments: Sequence[tuple[int, int]], block_size: int) -> tuple[Key, ...]:
    """Keys of the full blocks of a prompt that is given as segments (see ``WorkloadRequest``).

    Equal segments in equal places give equal keys, without any tokens being made.
    """
    keys: list[Key] = []
    chain, room = 0, block_size
    for name, length in segments:
        start = 0
        while start < length:
            size = min(room, length - start)
            chain = hash((chain, abs(name), name < 0, start, size))  # hash(-1) == hash(-2)
            start += size
            room -= size
            if not room:
                keys.append(chain)
                room = block_size
    return tuple(keys)


def _leading(keys: Sequence[Key], known: Container[Key]) -> int:
    """Length of the leading part that is known; ``known`` is closed under prefixes."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high + 1) // 2
        if keys[middle - 1] in known:
            low = middle
        else:
            high = middle - 1
    return low
