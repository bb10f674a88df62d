"""The prefix cache: full KV blocks kept by content, so that an equal prefix is not computed again.

A radix tree with one full block to a node (SGLang, Zheng et al., NeurIPS 2024, over the block
chain of vLLM's automatic prefix caching). The way from the root to a node is the node's whole
prefix, and each step compares tokens, so no hash ever decides. What a look-up costs depends on the
prompt: one dictionary access a block, whatever the size of the cache.

A *path* is the list of nodes that a sequence's blocks stand for. Whoever holds a node holds its
parents too. So a node that nobody holds has only such nodes below it, and eviction, which takes
leaves, never leaves a hole in a chain.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ch15_helpers.kv.allocator import BlockAllocator
from ch15_helpers.kv.keys import BlockKey, KeyTable
from ch15_helpers.kv.policies import EvictionPolicy, RecomputeCost, make_eviction_policy

Content = Callable[[int, int], tuple[Any, ...]]
"""Content of tokens ``start .. stop - 1`` of a sequence: their ids, or, where there is no text
(the simulator), pieces ``(name, offset, length)`` of named text. Equal tuples are equal text."""


@dataclass
class PrefixStats:
    """Counts since the start. Prompts are counted when they are first admitted.

    Attributes:
        lookups: prompts.
        prompt_tokens, hit_tokens: of those prompts, and what was found.
        prompt_blocks, hit_blocks: the same in full blocks.
        copied_tokens: part of ``hit_tokens``, from the block in which a prompt diverged.
        promoted_tokens: part of ``hit_tokens``, brought back from a lower tier.
        recovered_tokens: found by preempted requests when they came back.
        inserted, evicted: blocks.
        duplicates: blocks that were computed twice at the same time; one of each was freed.
    """

    lookups: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    prompt_blocks: int = 0
    hit_blocks: int = 0
    copied_tokens: int = 0
    promoted_tokens: int = 0
    recovered_tokens: int = 0
    inserted: int = 0
    evicted: int = 0
    duplicates: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were not computed."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def block_hit_rate(self) -> float:
        """Share of the prompts' full blocks that were found."""
        return self.hit_blocks / self.prompt_blocks if self.prompt_blocks else 0.0


class CachedBlock:
    """A node of the tree. Compared by identity.

    Attributes:
        block: its physical block; -1 once it is evicted.
        parent: the block before it; the root, without a block, before the first.
        content: of its tokens.
        depth: blocks before it.
    """

    __slots__ = ("_key", "block", "children", "content", "depth", "order", "parent")

    def __init__(self, block: int, parent: CachedBlock | None, content: tuple[Any, ...]) -> None:
        self.block = block
        self.parent = parent
        self.content = content
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple[Any, ...], CachedBlock] = {}
        self.order: list[tuple[Any, ...]] = []  # of the children, to find the nearest
        self._key: BlockKey | None = None

    def key(self, keys: KeyTable) -> BlockKey | None:
        """Its name outside this cache; None for the root."""
        nodes = [self]
        while nodes[-1]._key is None and nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        key = nodes.pop()._key
        for node in reversed(nodes):
            key = node._key = keys.intern(key, node.content)
        return key


class PrefixCache:
    """Finds, keeps and gives up blocks by content, over a BlockAllocator.

    Attributes:
        stats: see PrefixStats.
        keep_evicted: note what is evicted for ``take_evicted``, so that a lower tier gets it.
        policy: chooses among the leaves that nobody holds.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        keys: KeyTable,
        policy: str | EvictionPolicy = "lru",
        cost: RecomputeCost | None = None,
    ) -> None:
        self.block_size = keys.block_size
        self.keys = keys
        self.policy = make_eviction_policy(policy)
        self.stats = PrefixStats()
        self.keep_evicted = False
        self.cached: dict[int, CachedBlock] = {}  # by physical block
        self._cost = RecomputeCost() if cost is None else cost
        self._allocator = allocator
        self._root = CachedBlock(-1, None, ())
        self._root.depth = -1
        self._evicted: list[tuple[int, BlockKey]] = []
        allocator.attach(self)

    def __len__(self) -> int:
        return len(self.cached)

    # ---- look-up -----------------------------------------------------------------------------

    def follow(self, path: list[CachedBlock], content: Content, limit: int) -> None:
        """Bring ``path`` up to date: drop what was evicted, add what has been cached since.

        Args:
            path: an earlier answer for the same content, or an empty list; changed in place.
            limit: tokens at whose end to stop; only full blocks before it are found.
        """
        while path and path[-1].block < 0:
            path.pop()
        size = self.block_size
        node = path[-1] if path else self._root
        for start in range(len(path) * size, limit - size + 1, size):
            found = node.children.get(content(start, start + size))
            if found is None:
                return
            path.append(found)
            node = found

    def nearest(
        self, path: Sequence[CachedBlock], content: Content, limit: int
    ) -> tuple[CachedBlock, int] | None:
        """The cached block that agrees longest with what comes after ``path``, and how long.

        In sorted order the best match is a neighbour of the wanted content, so that a node's many
        children need not be searched.
        """
        start = len(path) * self.block_size
        node = path[-1] if path else self._root
        if start >= limit or not node.order:
            return None
        wanted = content(start, min(limit, start + self.block_size))
        at = bisect_left(node.order, wanted)
        near = node.order[max(0, at - 1) : at + 1]
        count, best = max((_num_common(wanted, other), other) for other in near)
        return (node.children[best], count) if count else None

    def num_idle(self, path: Sequence[CachedBlock]) -> int:
        """How many blocks of ``path`` nobody holds; they are its last ones."""
        refs = self._allocator.ref_count
        return len(path) - bisect_left(path, True, key=lambda node: refs(node.block) == 1)

    # ---- in and out --------------------------------------------------------------------------

    def extend(
        self, path: list[CachedBlock], blocks: Sequence[int], content: Content, num_tokens: int
    ) -> list[tuple[int, int]]:
        """Cache the full blocks of a sequence whose first ``num_tokens`` tokens are computed.

        Args:
            path: what the sequence's first blocks are cached as; it gets longer.
            blocks: the sequence's block table.

        Returns:
            (index, block) where another sequence has cached the same content meanwhile: put that
            block into the table instead of the sequence's own.
        """
        size = self.block_size
        others: list[tuple[int, int]] = []
        parent = path[-1] if path else self._root
        for index in range(len(path), num_tokens // size):
            text = content(index * size, (index + 1) * size)
            node = parent.children.get(text)
            if node is None:
                node = self._insert(parent, text, blocks[index])
            elif node.block != blocks[index]:
                others.append((index, node.block))
                self.stats.duplicates += 1
            path.append(node)
            parent = node
        return others

    def discard(self, nodes: Sequence[CachedBlock]) -> None:
        """Forget blocks whose content is not to be trusted; those that somebody holds stay."""
        keep, self.keep_evicted = self.keep_evicted, False
        for node in reversed(nodes):
            if self._is_idle_leaf(node):
                self._evict(node)
        self.keep_evicted = keep

    def clear(self) -> None:
        """Give up every block that nobody holds."""
        self.reclaim(self._allocator.num_idle)

    def take_evicted(self) -> list[tuple[int, BlockKey]]:
        """(block, key) of what was evicted since the last call; the blocks may be in use again,
        but nothing has been written to them before the next step."""
        evicted, self._evicted = self._evicted, []
        return evicted

    # ---- called by the allocator ---------------------------------------------------------------

    def became_idle(self, block: int) -> None:
        """A use has ended."""
        node = self.cached[block]
        self.policy.touch(node)
        if not node.children:
            self.policy.unpin(node)

    def became_busy(self, block: int) -> None:
        """A use has begun."""
        self.policy.pin(self.cached[block])

    def reclaim(self, count: int) -> None:
        """Evict ``count`` idle blocks, leaves first."""
        for _ in range(count):
            self._evict(cast("CachedBlock", self.policy.victim()))

    def check_invariants(self) -> None:
        """Raise AssertionError unless tree, pool and policy agree."""
        assert len(self.policy) == len(self.cached), "the policy knows other blocks"
        for block, node in self.cached.items():
            parent = node.parent
            assert parent is not None, f"block {block} is out of the tree"
            assert node.block == block, f"block {block} calls itself {node.block}"
            assert parent.children.get(node.content) is node, f"block {block} hangs nowhere"
            assert parent is self._root or parent.block in self.cached, "a chain has a hole"
            assert node.order == sorted(node.children), f"children of {block} out of order"
            refs = self._allocator.ref_count(block)
            assert refs >= 1, f"cached block {block} is free"
            if parent is not self._root:
                held = refs == 1 or self._allocator.ref_count(parent.block) > 1
                assert held, f"block {block} is held, its parent {parent.block} is not"

    # ---- inside --------------------------------------------------------------------------------

    def _insert(self, parent: CachedBlock, content: tuple[Any, ...], block: int) -> CachedBlock:
        node = CachedBlock(block, parent, content)
        self._allocator.incref(block)  # somebody holds it, so this does not make it busy
        self.cached[block] = node
        parent.children[content] = node
        insort(parent.order, content)
        cost_s = self._cost.block_s(node.depth, self.block_size)
        self.policy.insert(node, cost_s=cost_s, pinned=True)
        self.stats.inserted += 1
        return node

    def _evict(self, node: CachedBlock) -> None:
        parent, block = node.parent, node.block
        assert parent is not None, "evicted twice"
        assert not node.children, "only a leaf can be evicted"
        if self.keep_evicted:
            key = node.key(self.keys)
            assert key is not None
            self._evicted.append((block, key))
        self.policy.remove(node)
        del self.cached[block], parent.children[node.content]
        del parent.order[bisect_left(parent.order, node.content)]
        node.block, node.parent = -1, None
        self._allocator.release_idle(block)
        self.stats.evicted += 1
        if self._is_idle_leaf(parent):
            self.policy.unpin(parent)

    def _is_idle_leaf(self, node: CachedBlock) -> bool:
        return node.block >= 0 and not node.children and self._allocator.ref_count(node.block) == 1


def _num_common(first: tuple[Any, ...], second: tuple[Any, ...]) -> int:
    """Leading tokens on which two contents agree."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            if isinstance(one, tuple) and one[:2] == other[:2]:
                count += min(one[2], other[2])
            break
        count += one[2] if isinstance(one, tuple) else 1
    return count
