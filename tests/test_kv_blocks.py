"""Block bookkeeping: unit tests, and a random walk checked against a plain dictionary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ch15_helpers.errors import CapacityError
from ch15_helpers.kv.blocks import BlockAllocator, BlockManager, OutOfBlocks
from ch15_helpers.kv.cache import PagedKVCache, swap_blocks
from ch15_helpers.model.config import TINY


def test_allocator_hands_out_each_block_once_and_warm_blocks_first() -> None:
    allocator = BlockAllocator(4)
    assert allocator.allocate_many(3) == [0, 1, 2]
    allocator.free(1)
    assert allocator.allocate() == 1
    assert allocator.allocate() == 3
    assert (allocator.num_free, allocator.num_used, allocator.num_total) == (0, 4, 4)
    allocator.check_invariants()


def test_allocate_many_is_all_or_nothing() -> None:
    allocator = BlockAllocator(3)
    allocator.allocate()
    with pytest.raises(OutOfBlocks, match=r"3 KV blocks are needed, 2 of 3 are free") as info:
        allocator.allocate_many(3)
    assert isinstance(info.value, CapacityError)
    assert (info.value.blocks_needed, info.value.blocks_total) == (3, 3)
    assert allocator.num_free == 2
    assert allocator.can_allocate(2) and not allocator.can_allocate(3)
    allocator.allocate_many(2)
    with pytest.raises(OutOfBlocks):
        allocator.allocate()


def test_double_free_and_sharing_a_free_block_are_refused() -> None:
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.incref(block)
    allocator.free(block)
    assert allocator.ref_count(block) == 1
    allocator.free(block)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(block)
    with pytest.raises(ValueError, match="only a block in use"):
        allocator.incref(block)


def test_invariants_bite() -> None:
    manager = BlockManager(4, 2)
    manager.ensure("a", 3)
    manager.check_invariants()
    manager.tables[manager.row("a"), 0] = 3
    with pytest.raises(AssertionError, match="stale"):
        manager.check_invariants()
    manager = BlockManager(4, 2)
    manager.ensure("a", 3)
    manager.allocator.incref(manager.table("a")[0])
    with pytest.raises(AssertionError, match="2 references, 1 tables"):
        manager.check_invariants()


def test_growth_takes_one_block_per_block_size_tokens() -> None:
    manager = BlockManager(8, 4)
    for tokens in range(1, 17):
        assert manager.can_grow("a", tokens)
        assert manager.ensure("a", tokens) == []
        assert len(manager.table("a")) == -(-tokens // 4)
    assert manager.slot("a", 5) == manager.table("a")[1] * 4 + 1
    assert manager.capacity("a") == 16
    manager.truncate("a", 5)
    assert len(manager.table("a")) == 2
    manager.free("a")
    assert manager.allocator.num_free == 8


def test_fork_copies_only_the_block_that_is_written() -> None:
    manager = BlockManager(8, 4)
    manager.ensure("parent", 6)
    manager.fork("parent", "child")
    assert manager.allocator.num_used == 2
    assert not manager.can_write("child", 6)
    (copy,) = manager.ensure("child", 7)
    assert copy == (manager.table("parent")[1], manager.table("child")[1])
    assert manager.table("child")[0] == manager.table("parent")[0]
    assert manager.ensure("parent", 7) == []  # the only holder by now
    assert manager.can_write("child", 6) and manager.can_write("parent", 6)
    # At a block's end there is nothing to copy: the write goes to a new block.
    manager.fork("parent", "other")
    assert manager.ensure("other", 9) == []
    manager.check_invariants()


def test_ensure_changes_nothing_when_blocks_are_short() -> None:
    manager = BlockManager(3, 4)
    manager.ensure("parent", 6)
    manager.fork("parent", "child")
    assert manager.blocks_needed("child", 10, num_new=4) == 2
    with pytest.raises(OutOfBlocks):
        manager.ensure("child", 10, num_new=4)
    assert manager.table("child") == manager.table("parent")
    with pytest.raises(OutOfBlocks):
        manager.ensure("stranger", 5)
    assert "stranger" not in manager
    manager.check_invariants()


NUM_BLOCKS, NUM_HOST_BLOCKS, BLOCK_SIZE = 12, 6, 3


class PoolMachine(RuleBasedStateMachine):
    """Random admit / append / fork / truncate / swap / preempt / free over real pages.

    The oracle is a dictionary of token lists. Each token's value is unique, so that a block that
    two sequences write, or that is reused too early, shows as a wrong value somewhere.
    """

    sequences = Bundle("sequences")
    swapped = Bundle("swapped")

    @initialize(layout=st.sampled_from(["block_major", "layer_major"]))
    def start(self, layout: str) -> None:
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.host = BlockAllocator(NUM_HOST_BLOCKS)
        self.cache = PagedKVCache(TINY, NUM_BLOCKS, BLOCK_SIZE, layout=layout)
        self.host_cache = PagedKVCache(TINY, NUM_HOST_BLOCKS, BLOCK_SIZE)
        self.oracle: dict[int, list[float]] = {}
        self.on_host: dict[int, tuple[list[int], list[float]]] = {}
        self.next_value = 0
        self.next_id = 0

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def write(self, seq: int, count: int) -> None:
        """Append ``count`` tokens, with all copies made first, as the runner does."""
        known = self.oracle[seq]
        total = len(known) + count
        if not self.manager.can_grow(seq, total, count):
            with pytest.raises(OutOfBlocks):
                self.manager.ensure(seq, total, count)
            return
        self.cache.copy_blocks(self.manager.ensure(seq, total, count))
        for position in range(len(known), total):
            assert self.manager.can_write(seq, position), "another sequence holds this block"
            self.next_value += 1
            block, offset = divmod(self.manager.slot(seq, position), BLOCK_SIZE)
            self.cache.pages[block, :, :, offset] = float(self.next_value)
            known.append(float(self.next_value))

    @rule(target=sequences, count=st.integers(1, 10))
    def admit(self, count: int) -> int:
        seq = self.new_id()
        self.oracle[seq] = []
        if self.manager.can_allocate(count):
            self.write(seq, count)
            assert len(self.oracle[seq]) == count
        else:
            self.manager.ensure(seq, 0)
        return seq

    @rule(seq=sequences, count=st.integers(1, 5))
    def append(self, seq: int, count: int) -> None:
        self.write(seq, count)

    @rule(target=sequences, seq=sequences)
    def fork(self, seq: int) -> int:
        child = self.new_id()
        self.manager.fork(seq, child)
        self.oracle[child] = list(self.oracle[seq])
        return child

    @rule(seq=sequences, data=st.data())
    def roll_back(self, seq: int, data: st.DataObject) -> None:
        keep = data.draw(st.integers(0, len(self.oracle[seq])))
        self.manager.truncate(seq, keep)
        del self.oracle[seq][keep:]

    @rule(target=swapped, seq=consumes(sequences))
    def swap_out(self, seq: int) -> int:
        table = self.manager.table(seq)
        if self.host.can_allocate(len(table)):
            blocks = self.host.allocate_many(len(table))
            swap_blocks(self.cache, self.host_cache, list(zip(table, blocks, strict=True)))
            self.on_host[seq] = (blocks, self.oracle[seq])
        self.manager.free(seq)  # without room on the host: preempted, to be recomputed
        del self.oracle[seq]
        return seq

    @rule(target=sequences, seq=consumes(swapped))
    def swap_in(self, seq: int) -> int:
        blocks, known = self.on_host.pop(seq, ([], []))
        again = self.new_id()
        if known and self.manager.can_allocate(len(known)):
            self.manager.ensure(again, len(known), len(known))
            pairs = list(zip(blocks, self.manager.table(again), strict=True))
            swap_blocks(self.host_cache, self.cache, pairs)
        else:
            known = []
            self.manager.ensure(again, 0)
        self.host.free_many(blocks)
        self.oracle[again] = known
        return again

    @rule(seq=consumes(sequences))
    def free(self, seq: int) -> None:
        self.manager.free(seq)
        del self.oracle[seq]

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_invariants()
        self.host.check_invariants()
        held = {block for seq in self.oracle for block in self.manager.table(seq)}
        assert self.manager.allocator.num_used == len(held)
        assert self.manager.allocator.num_free + len(held) == NUM_BLOCKS
        assert self.host.num_used == sum(len(blocks) for blocks, _ in self.on_host.values())

    @invariant()
    def contents_are_what_was_written(self) -> None:
        for seq, known in getattr(self, "oracle", {}).items():
            table = self.manager.table(seq)
            pages = self.cache.read_blocks(table)  # [n, layers, 2, block_size, heads, dim]
            found = pages.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)[: len(known)].flatten(1)
            expected = torch.tensor(known)[:, None].expand_as(found)
            assert torch.equal(found, expected), f"sequence {seq}"


PoolMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
)
TestPool = PoolMachine.TestCase
