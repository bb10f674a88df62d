"""Free and used KV blocks: a stack of free ids and a reference count for each block.

A cache may hold one reference of its own to a block. A block that nobody else holds any more is
then *idle*: its content is kept in case it is wanted again, but it counts as free, and the cache
gives it up when an allocation needs it (vLLM's prefix cache works this way).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Protocol

from ch15_helpers.errors import CapacityError


class BlockCache(Protocol):
    """What keeps idle blocks, and what it must be told."""

    @property
    def cached(self) -> Container[int]:
        """Blocks that the cache holds a reference to."""

    def became_idle(self, block: int) -> None:
        """The last holder beside the cache is gone."""

    def became_busy(self, block: int) -> None:
        """An idle block has a holder again."""

    def reclaim(self, count: int) -> None:
        """Give up ``count`` idle blocks with ``BlockAllocator.release_idle``."""


class OutOfBlocks(CapacityError):
    """The pool has fewer free blocks than the operation needs; nothing was changed."""


class BlockAllocator:
    """Hands out the ids ``0 .. num_blocks - 1`` and counts how many holders each has.

    The free list is a stack: a block that was freed last is still warm in the caches and in the
    page table, and is handed out first. Every operation is O(1) per block, beside what a cache
    does to find a block to give up.

    Attributes:
        num_idle: blocks that a cache alone holds.
        cached: blocks that a cache holds, idle or not.
    """

    __slots__ = ("_cache", "_free", "_refs", "cached", "num_idle", "num_total")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks must not be negative, got {num_blocks}")
        self.num_total = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._cache: BlockCache | None = None
        self.cached: Container[int] = ()
        self.num_idle = 0

    def attach(self, cache: BlockCache) -> None:
        """From now on ``cache`` may keep blocks that nobody else holds."""
        if self._cache is not None:
            raise ValueError("the pool has a cache already")
        self._cache, self.cached = cache, cache.cached

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: those that nobody holds, and the idle ones."""
        return len(self._free) + self.num_idle

    @property
    def num_used(self) -> int:
        """Blocks in use, counted from the reference counts; an idle block is not in use."""
        return self.num_total - self._refs.count(0) - self.num_idle

    def can_allocate(self, n: int) -> bool:
        """Whether ``allocate_many(n)`` would succeed."""
        return n <= self.num_free

    def allocate(self) -> int:
        """Take one free block; its reference count becomes 1. Raises OutOfBlocks."""
        return self.allocate_many(1)[0]

    def allocate_many(self, n: int) -> list[int]:
        """Take ``n`` free blocks, or none at all. Raises OutOfBlocks."""
        if n <= 0:
            return []
        if n > len(self._free):
            if n > self.num_free or self._cache is None:
                raise self._out_of_blocks(n)
            self._cache.reclaim(n - len(self._free))
        blocks = self._free[: -n - 1 : -1]
        del self._free[-n:]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def incref(self, block: int) -> None:
        """Add a holder to a block that is in use, or idle."""
        refs = self._refs[block]
        if refs < 1:
            raise ValueError(f"block {block} is free; only a block in use can be shared")
        self._refs[block] = refs + 1
        if refs == 1 and self._cache is not None and block in self.cached:
            self.num_idle -= 1
            self._cache.became_busy(block)

    def free(self, block: int) -> None:
        """Drop one holder; the block returns to the free list with the last one."""
        refs = self._refs[block]
        if refs < 1 or (refs == 1 and block in self.cached):
            raise ValueError(f"block {block} is already free: it was freed twice")
        self._refs[block] = refs - 1
        if refs == 1:
            self._free.append(block)
        elif refs == 2 and self._cache is not None and block in self.cached:
            self.num_idle += 1
            self._cache.became_idle(block)

    def release_idle(self, block: int) -> None:
        """The cache drops its reference to a block that it has just struck off ``cached``."""
        assert self._refs[block] == 1, f"block {block} is in use"
        self.num_idle -= 1
        self._refs[block] = 0
        self._free.append(block)

    def free_many(self, blocks: Iterable[int]) -> None:
        """Drop one holder of each block."""
        for block in blocks:
            self.free(block)

    def ref_count(self, block: int) -> int:
        """How many hold this block; 0 when it is free."""
        return self._refs[block]

    def check_invariants(self) -> None:
        """Raise AssertionError unless free and used blocks partition the pool."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert all(0 <= block < self.num_total for block in free), "a free block does not exist"
        for block, refs in enumerate(self._refs):
            assert refs >= 0, f"block {block} has {refs} references"
            assert (refs == 0) == (block in free), (
                f"block {block} has {refs} references and is{'' if block in free else ' not'} free"
            )
        idle = sum(refs == 1 and b in self.cached for b, refs in enumerate(self._refs))
        assert idle == self.num_idle, f"{idle} blocks are idle, {self.num_idle} are counted"
        assert self.num_free + self.num_used == self.num_total, "free + used != total"

    def _out_of_blocks(self, n: int) -> OutOfBlocks:
        return OutOfBlocks(
            f"{n} KV blocks are needed, {self.num_free} of {self.num_total} are free; "
            "free a sequence or make the pool larger",
            blocks_needed=n,
            blocks_total=self.num_total,
        )
