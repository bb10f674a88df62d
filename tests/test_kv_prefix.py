"""The prefix cache by itself: what it finds, what it gives up, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ch15_helpers.kv.blocks import BlockManager, OutOfBlocks
from ch15_helpers.kv.keys import KeyTable
from ch15_helpers.kv.policies import (
    EVICTION_POLICIES,
    EvictionPolicy,
    HeapPolicy,
    RecomputeCost,
    make_eviction_policy,
)
from ch15_helpers.kv.prefix import CachedBlock, PrefixCache

SIZE = 4


class Pool:
    """A block manager with a cache, and the way in and out that the scheduler takes."""

    def __init__(
        self, num_blocks: int, policy: str | EvictionPolicy = "lru", size: int = SIZE
    ) -> None:
        self.blocks = BlockManager(num_blocks, size)
        self.cache = PrefixCache(self.blocks.allocator, KeyTable(size), policy)
        self.size = size
        self.num_added = 0

    def path(self, tokens: Sequence[int]) -> list[CachedBlock]:
        found: list[CachedBlock] = []
        self.cache.follow(found, reader(tokens), len(tokens))
        return found

    def begin(self, tokens: Sequence[int]) -> tuple[int, list[CachedBlock]]:
        """Blocks for a sequence, the cached ones shared; OutOfBlocks leaves nothing behind."""
        name, path = self.num_added, self.path(tokens)
        needed = self.blocks.blocks_for(len(tokens)) - len(path) + self.cache.num_idle(path)
        if needed > self.blocks.allocator.num_free:
            raise OutOfBlocks("full")
        self.num_added += 1
        self.blocks.adopt(name, [node.block for node in path])
        self.blocks.ensure(name, len(tokens), len(tokens) - len(path) * self.size)
        return name, path

    def keep(self, name: int, path: list[CachedBlock], tokens: Sequence[int]) -> None:
        table = self.blocks.table(name)
        for index, block in self.cache.extend(path, table, reader(tokens), len(tokens)):
            self.blocks.replace(name, index, block)

    def serve(self, tokens: Sequence[int]) -> int:
        """Compute a sequence and let it go; how many of its blocks were there."""
        name, path = self.begin(tokens)
        found = len(path)
        self.keep(name, path, tokens)
        self.blocks.free(name)
        return found

    def check(self) -> None:
        self.blocks.check_invariants()
        self.cache.check_invariants()
        assert isinstance(self.cache.policy, HeapPolicy)
        self.cache.policy.check_invariants()


def reader(tokens: Sequence[int]) -> Any:
    return lambda start, stop: tuple(tokens[start:stop])


def test_a_prefix_is_found_up_to_where_it_differs() -> None:
    pool = Pool(16)
    pool.serve(range(12))
    assert len(pool.path(range(12))) == 3
    assert len(pool.path([*range(8), 99, 99, 99, 99])) == 2
    assert len(pool.path([99, *range(1, 12)])) == 0, "a block is nothing without what is before it"
    assert len(pool.path(range(11))) == 2, "only full blocks are kept"
    pool.check()


def test_what_is_cached_counts_as_free_until_somebody_holds_it() -> None:
    pool = Pool(8)
    pool.serve(range(16))
    allocator = pool.blocks.allocator
    assert (allocator.num_free, allocator.num_used, len(pool.cache)) == (8, 0, 4)
    name, _ = pool.begin(range(10))
    assert (allocator.num_free, allocator.num_used) == (5, 3)
    pool.check()
    with pytest.raises(OutOfBlocks):
        pool.begin(range(100, 124))
    pool.begin(range(100, 120))  # the last two free blocks, and two idle ones are given up
    assert len(pool.path(range(16))) == 2, "what is held stays"
    pool.blocks.free(name)
    pool.check()


def test_leaves_go_first_so_that_no_chain_has_a_hole() -> None:
    pool = Pool(6)
    pool.serve([1] * 8 + [2] * 8)  # 1 1 2 2
    pool.serve([1] * 8 + [3] * 8)  # 1 1 3 3, all six blocks
    pool.cache.reclaim(1)
    assert len(pool.path([1] * 8 + [2] * 8)) == 3
    pool.cache.reclaim(2)
    assert len(pool.path([1] * 8 + [2] * 8)) == 2
    assert len(pool.path([1] * 8 + [3] * 8)) == 3
    pool.check()
    pool.cache.clear()
    assert len(pool.cache) == 0 and pool.blocks.allocator.num_free == 6
    pool.check()


def test_lru_gives_up_whole_conversations_not_every_tail() -> None:
    pool = Pool(12)
    for user in range(3):
        pool.serve([user] * 16)
    pool.serve([0] * 16)
    pool.cache.reclaim(4)
    assert [len(pool.path([user] * 16)) for user in range(3)] == [4, 0, 4]


def test_equal_blocks_computed_at_the_same_time_are_kept_once() -> None:
    pool = Pool(16)
    first, path_1 = pool.begin([7] * 8)
    second, path_2 = pool.begin([7] * 8)
    pool.keep(first, path_1, [7] * 8)
    pool.keep(second, path_2, [7] * 8)
    assert pool.blocks.table(first) == pool.blocks.table(second)
    assert pool.cache.stats.duplicates == 2 and pool.blocks.allocator.num_used == 2
    pool.check()


def test_the_nearest_block_agrees_longest() -> None:
    pool = Pool(64, size=6)
    branches = ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9], [1, 8, 8, 8, 8, 8], [2, 2, 2, 2, 2, 2])
    for branch in branches:
        pool.serve([0] * 6 + branch)
    path = pool.path([0] * 6)

    def nearest(tail: list[int], limit: int = 12) -> tuple[list[int], int] | None:
        found = pool.cache.nearest(path, reader([0] * 6 + tail), limit)
        return None if found is None else (list(found[0].content), found[1])

    assert nearest([1, 2, 3, 4, 0, 0]) == (branches[0], 4)
    assert nearest([1, 2, 3, 9, 9, 0]) == (branches[1], 5)
    assert nearest([1, 7, 0, 0, 0, 0]) is not None and nearest([1, 7, 0, 0, 0, 0])[1] == 1
    assert nearest([3, 0, 0, 0, 0, 0]) is None
    assert nearest([1, 2, 3, 4, 5, 6], limit=11) == (branches[0], 5), "not past the limit"
    assert nearest([1, 2], limit=6) is None


def test_nothing_rests_on_a_hash() -> None:
    """Tokens whose hashes all collide: -1 and -2 do in CPython, and so do tuples of them."""
    assert hash((-1,) * SIZE) == hash((-2,) * SIZE)
    pool = Pool(16)
    pool.serve([-1] * 8)
    assert len(pool.path([-2] * 8)) == 0
    assert len(pool.path([-1] * 4 + [-2] * 4)) == 1
    pool.serve([-2] * 8)
    assert len(pool.path([-1] * 8)) == len(pool.path([-2] * 8)) == 2
    first, second = pool.path([-1] * 8)[1], pool.path([-2] * 8)[1]
    assert first.block != second.block
    assert first.key(pool.cache.keys) is not second.key(pool.cache.keys)


def test_evicted_blocks_are_handed_down_with_their_names() -> None:
    pool = Pool(4)
    pool.cache.keep_evicted = True
    pool.serve(range(16))
    blocks = [node.block for node in pool.path(range(16))]
    pool.serve(range(100, 108))
    evicted = pool.cache.take_evicted()
    assert [block for block, _ in evicted] == blocks[:1:-1], "the last blocks of the chain"
    assert [key.prefix_tokens() for _, key in evicted] == [tuple(range(16)), tuple(range(12))]
    assert pool.cache.take_evicted() == []


def test_names_of_long_chains_do_not_recurse() -> None:
    pool = Pool(5000, size=1)
    pool.cache.keep_evicted = True
    pool.serve(range(5000))
    pool.cache.reclaim(1)
    ((_, key),) = pool.cache.take_evicted()
    assert key.depth == 4999


def test_what_is_not_trusted_is_struck_off() -> None:
    pool = Pool(16)
    pool.cache.keep_evicted = True
    pool.serve(range(8))
    name, path = pool.begin(range(16))
    pool.keep(name, path, range(16))
    pool.blocks.free(name)
    pool.cache.discard(path[2:])
    assert len(pool.path(range(16))) == 2 and pool.cache.take_evicted() == []
    pool.check()


def test_deep_blocks_are_dear() -> None:
    cost = RecomputeCost(token_s=2.0, pair_s=1.0)
    assert cost.block_s(0, 4) == 2 * 4 + (1 + 2 + 3 + 4)
    assert cost.block_s(1, 4) == 2 * 4 + (5 + 6 + 7 + 8)


class Counting(dict[Any, Any]):
    """A dictionary that counts what is asked of it."""

    asked = 0

    def get(self, *args: Any) -> Any:
        Counting.asked += 1
        return super().get(*args)


@pytest.mark.parametrize("num_cached", [40, 10_000])
def test_a_lookup_costs_what_the_prompt_costs(num_cached: int) -> None:
    """Counted, not timed: token reads and dictionary accesses of hits, misses and part hits."""
    pool = Pool(num_cached)
    for number in range(num_cached // 4):
        pool.serve([number] * 16)
    assert len(pool.cache) == num_cached

    def cost(tokens: list[int]) -> tuple[int, int]:
        reads = []

        def content(start: int, stop: int) -> tuple[int, ...]:
            reads.append((start, stop))
            return tuple(tokens[start:stop])

        nodes = [pool.cache._root, *pool.path(tokens)]
        for node in nodes:
            node.children = Counting(node.children)
        Counting.asked = 0
        path: list[CachedBlock] = []
        pool.cache.follow(path, content, len(tokens))
        pool.cache.nearest(path, content, len(tokens))
        return Counting.asked, sum(stop - start for start, stop in reads)

    assert cost([3] * 16) == (4, 16)
    assert cost([3] * 10) == (2, 10)
    assert cost([-5] * 4000) == (1, 8), "a miss is seen at the first block"


class Touching:
    """A policy that counts its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.inner = make_eviction_policy("lru")
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)


def test_a_hit_costs_the_policy_what_it_costs_the_prompt() -> None:
    calls = []
    for num_blocks in (64, 10_000):
        policy = Touching()
        pool = Pool(num_blocks, policy)  # type: ignore[arg-type]
        for number in range(num_blocks // 4):
            pool.serve([number] * 16)
        policy.calls = 0
        pool.serve([1] * 16)
        calls.append(policy.calls)
    assert calls[0] == calls[1] <= 4 * 4


class CacheMachine(RuleBasedStateMachine):
    """Blocks hold text; whatever the cache hands out must hold the text that it stands for."""

    @initialize(
        num_blocks=st.sampled_from([3, 8, 20]),
        size=st.sampled_from([1, 2, 3]),
        policy=st.sampled_from(EVICTION_POLICIES),
    )
    def start(self, num_blocks: int, size: int, policy: str) -> None:
        self.pool = Pool(num_blocks, policy, size)
        self.memory: dict[int, tuple[int, ...]] = {}  # content of each physical block
        self.live: dict[int, tuple[list[int], list[CachedBlock]]] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14))
    def admit(self, tokens: list[int]) -> None:
        try:
            name, path = self.pool.begin(tokens)
        except OutOfBlocks:
            return
        self.live[name] = (tokens, path)
        self.write(name, len(path) * self.pool.size)

    @rule(pick=st.integers(0, 9), token=st.integers(0, 2))
    @precondition(lambda self: self.live)
    def append(self, pick: int, token: int) -> None:
        name = sorted(self.live)[pick % len(self.live)]
        tokens, _ = self.live[name]
        if self.pool.blocks.can_grow(name, len(tokens) + 1):
            copies = self.pool.blocks.ensure(name, len(tokens) + 1)
            self.memory.update({target: self.memory[source] for source, target in copies})
            tokens.append(token)
            self.write(name, len(tokens) - 1)

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.live)
    def keep(self, pick: int) -> None:
        name = sorted(self.live)[pick % len(self.live)]
        self.pool.keep(name, self.live[name][1], self.live[name][0])

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.live)
    def fork(self, pick: int) -> None:
        parent = sorted(self.live)[pick % len(self.live)]
        child = self.pool.num_added
        self.pool.num_added += 1
        tokens, path = self.live[parent]
        self.pool.keep(parent, path, tokens)
        self.pool.blocks.fork(parent, child)
        self.live[child] = (list(tokens), list(path))

    @rule(pick=st.integers(0, 9), trusted=st.booleans())
    @precondition(lambda self: self.live)
    def free(self, pick: int, trusted: bool) -> None:
        name = sorted(self.live)[pick % len(self.live)]
        _, path = self.live.pop(name)
        self.pool.blocks.free(name)
        if not trusted:
            self.pool.cache.discard(path)

    @rule(count=st.integers(1, 3))
    def evict(self, count: int) -> None:
        self.pool.cache.reclaim(min(count, self.pool.blocks.allocator.num_idle))

    def write(self, name: int, start: int) -> None:
        """Fill the blocks from the one that holds token ``start``."""
        tokens, size = self.live[name][0], self.pool.size
        table = self.pool.blocks.table(name)
        for index in range(start // size, len(table)):
            self.memory[table[index]] = tuple(tokens[index * size : (index + 1) * size])

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        size = self.pool.size
        for name, (tokens, path) in self.live.items():
            table = self.pool.blocks.table(name)
            held = [token for block in table for token in self.memory[block]]
            assert held == tokens
            assert [node.block for node in path] == table[: len(path)]
        for block, node in self.pool.cache.cached.items():
            key = node.key(self.pool.cache.keys)
            assert key is not None and key.depth == node.depth
            assert self.memory[block] == node.content == key.tokens
            assert len(key.prefix_tokens()) == (node.depth + 1) * size

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for name in self.live:
                self.pool.blocks.free(name)
            assert self.pool.blocks.allocator.num_used == 0
            self.pool.cache.clear()
            assert len(self.pool.cache) == 0
            self.pool.check()


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
