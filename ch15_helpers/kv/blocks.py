"""Which KV block belongs to whom: reference counts and block tables, without any tensor.

The vocabulary is PagedAttention's (Kwon et al., SOSP 2023): a sequence's *logical* blocks map to
*physical* blocks through its block table; blocks shared by a fork are copied on the first write.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from ch15_helpers.kv.allocator import BlockAllocator, OutOfBlocks

__all__ = ["BlockAllocator", "BlockManager", "CopyOp", "OutOfBlocks"]

CopyOp = tuple[int, int]
"""(source block, destination block): copy the content before the step writes."""


class BlockManager:
    """Block tables of all resident sequences, over one BlockAllocator.

    Tables are rows of one int32 matrix (``tables``, [rows, max blocks], padded with 0), so that
    the runner gathers a batch's tables with one indexing operation instead of a loop over tokens.
    A sequence keeps its row from the first ``ensure`` or ``fork`` until ``free``.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self.tables: npt.NDArray[np.int32] = np.zeros((8, 8), dtype=np.int32)
        self._rows: dict[Hashable, int] = {}
        self._blocks: dict[Hashable, list[int]] = {}
        self._free_rows = list(range(7, -1, -1))

    @property
    def num_seqs(self) -> int:
        """Sequences that hold a table."""
        return len(self._rows)

    def __contains__(self, seq_id: Hashable) -> bool:
        return seq_id in self._rows

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether a new sequence of ``num_tokens`` tokens fits now."""
        return self.blocks_for(num_tokens) <= self.allocator.num_free

    def blocks_needed(self, seq_id: Hashable, num_tokens: int, num_new: int = 1) -> int:
        """Free blocks that ``ensure`` with the same arguments would take."""
        blocks = self._blocks.get(seq_id, ())
        growth = self.blocks_for(num_tokens) - len(blocks)
        return max(0, growth) + len(self._shared(seq_id, num_tokens, num_new))

    def can_grow(self, seq_id: Hashable, num_tokens: int, num_new: int = 1) -> bool:
        """Whether ``ensure`` with the same arguments would succeed."""
        return self.blocks_needed(seq_id, num_tokens, num_new) <= self.allocator.num_free

    def ensure(self, seq_id: Hashable, num_tokens: int, num_new: int = 1) -> list[CopyOp]:
        """Make ``seq_id`` ready to write the last ``num_new`` of ``num_tokens`` tokens.

        The table is created or grown to cover ``num_tokens``; a block that is about to be written
        and that another sequence also holds is replaced by a fresh one.

        Returns:
            Copies to make before writing, in no particular order.

        Raises:
            OutOfBlocks: nothing was changed.
        """
        shared = self._shared(seq_id, num_tokens, num_new)
        growth = max(0, self.blocks_for(num_tokens) - len(self._blocks.get(seq_id, ())))
        fresh = self.allocator.allocate_many(growth + len(shared))
        row = self._rows[seq_id] if seq_id in self._rows else self._take_row(seq_id)
        blocks = self._blocks[seq_id]
        copies: list[CopyOp] = []
        for index in shared:
            source, target = blocks[index], fresh.pop()
            self.allocator.free(source)
            blocks[index] = target
            self.tables[row, index] = target
            copies.append((source, target))
        if fresh:
            start = len(blocks)
            blocks.extend(fresh)
            self._fit_columns(len(blocks))
            self.tables[row, start : len(blocks)] = fresh
        return copies

    def adopt(self, seq_id: Hashable, blocks: Sequence[int]) -> None:
        """Start the table of ``seq_id`` with blocks that others hold, too (a cached prefix)."""
        if seq_id in self._rows:
            raise ValueError(f"sequence {seq_id!r} already has a block table")
        row = self._take_row(seq_id)
        for block in blocks:
            self.allocator.incref(block)
        self._blocks[seq_id] = list(blocks)
        self._fit_columns(len(blocks))
        self.tables[row, : len(blocks)] = blocks

    def replace(self, seq_id: Hashable, index: int, block: int) -> None:
        """Let logical block ``index`` be ``block``, which has the same content and a holder."""
        blocks = self._blocks[seq_id]
        self.allocator.incref(block)
        self.allocator.free(blocks[index])
        blocks[index] = block
        self.tables[self._rows[seq_id], index] = block

    def rename(self, seq_id: Hashable, name: Hashable) -> None:
        """Let ``name`` hold what ``seq_id`` holds."""
        if name in self._rows:
            raise ValueError(f"sequence {name!r} already has a block table")
        self._rows[name] = self._rows.pop(seq_id)
        self._blocks[name] = self._blocks.pop(seq_id)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Give ``child`` the same blocks as ``parent``; no content is copied until one writes."""
        self.adopt(child, self._blocks[parent])

    def truncate(self, seq_id: Hashable, num_tokens: int) -> None:
        """Give back the blocks past ``num_tokens`` tokens (rollback of rejected draft tokens)."""
        blocks = self._blocks[seq_id]
        keep = self.blocks_for(num_tokens)
        if keep < len(blocks):
            self.allocator.free_many(reversed(blocks[keep:]))
            self.tables[self._rows[seq_id], keep : len(blocks)] = 0
            del blocks[keep:]

    def free(self, seq_id: Hashable) -> None:
        """Give back everything that ``seq_id`` holds."""
        row = self._rows.pop(seq_id)
        blocks = self._blocks.pop(seq_id)
        self.allocator.free_many(reversed(blocks))
        self.tables[row, : len(blocks)] = 0
        self._free_rows.append(row)

    def table(self, seq_id: Hashable) -> list[int]:
        """Physical blocks of ``seq_id`` in logical order (a copy)."""
        return list(self._blocks[seq_id])

    def row(self, seq_id: Hashable) -> int:
        """Row of ``tables`` that mirrors ``table(seq_id)``; fixed while the sequence is here."""
        return self._rows[seq_id]

    def capacity(self, seq_id: Hashable) -> int:
        """Tokens that the table covers."""
        return len(self._blocks[seq_id]) * self.block_size

    def slot(self, seq_id: Hashable, position: int) -> int:
        """``block * block_size + offset`` of the token at ``position``."""
        logical, offset = divmod(position, self.block_size)
        return self._blocks[seq_id][logical] * self.block_size + offset

    def can_write(self, seq_id: Hashable, position: int) -> bool:
        """Whether ``position`` is covered by a block that nobody else holds."""
        blocks = self._blocks[seq_id]
        logical = position // self.block_size
        return logical < len(blocks) and self.allocator.ref_count(blocks[logical]) == 1

    def check_invariants(self) -> None:
        """Raise AssertionError unless tables, matrix rows and reference counts agree."""
        self.allocator.check_invariants()
        held: dict[int, int] = {}
        for seq_id, blocks in self._blocks.items():
            assert len(set(blocks)) == len(blocks), f"{seq_id!r} holds a block twice"
            row = self.tables[self._rows[seq_id]]
            assert row[: len(blocks)].tolist() == blocks, f"row of {seq_id!r} is stale"
            assert not row[len(blocks) :].any(), f"row of {seq_id!r} is not padded with 0"
            for block in blocks:
                held[block] = held.get(block, 0) + 1
        for block in range(self.allocator.num_total):
            refs = self.allocator.ref_count(block) - (block in self.allocator.cached)
            assert refs == held.get(block, 0), (
                f"block {block}: {refs} references, {held.get(block, 0)} tables"
            )
        rows = sorted([*self._rows.values(), *self._free_rows])
        assert rows == list(range(len(self.tables))), "table rows leak"

    def _shared(self, seq_id: Hashable, num_tokens: int, num_new: int) -> list[int]:
        """Logical blocks in the range to be written that another sequence holds too."""
        blocks = self._blocks.get(seq_id)
        if not blocks:
            return []
        first = max(0, num_tokens - num_new) // self.block_size
        last = min(len(blocks), self.blocks_for(num_tokens))
        ref_count = self.allocator.ref_count
        return [index for index in range(first, last) if ref_count(blocks[index]) > 1]

    def _take_row(self, seq_id: Hashable) -> int:
        if not self._free_rows:
            rows = len(self.tables)
            self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)])
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        row = self._free_rows.pop()
        self._rows[seq_id] = row
        self._blocks[seq_id] = []
        return row

    def _fit_columns(self, num_blocks: int) -> None:
        width = self.tables.shape[1]
        if num_blocks > width:
            while width < num_blocks:
                width *= 2
            wider = np.zeros((len(self.tables), width), dtype=np.int32)
            wider[:, : self.tables.shape[1]] = self.tables
            self.tables = wider
