"""A KV pool as a transport sees it: blocks, cut by layers and KV heads, as rows of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ch15_helpers.kv.cache import PagedKVCache


class BlockRef(NamedTuple):
    """One block of one sequence.

    Attributes:
        block: physical id in the pool of whoever holds the reference.
        sequence: number of the sequence, the same on both sides; fits in 63 bits.
        index: logical block of the sequence.
    """

    block: int
    sequence: int
    index: int  # type: ignore[assignment]  # a tuple has a method of that name


@dataclass(frozen=True, slots=True)
class Part:
    """What of each block travels: layers and KV heads ``first .. last - 1``, numbered globally."""

    layers: tuple[int, int]
    heads: tuple[int, int]


def refs_of(table: Sequence[int], sequence: int) -> list[BlockRef]:
    """References to all blocks of a block table."""
    return [BlockRef(block, sequence, index) for index, block in enumerate(table)]


class RegisteredPool:
    """Packs parts of blocks into rows of bytes and unpacks them again.

    A row is the part in block-major order, [layers, 2, block_size, heads, head_dim]; of a
    quantised pool, its scales follow. Sections are padded to 8 bytes with zeros. The row of a part
    is the same for every layout and for every tensor-parallel degree.

    Attributes:
        cache: the pool.
        heads: global numbers of the KV heads that it holds.
    """

    def __init__(self, cache: PagedKVCache, first_head: int = 0) -> None:
        """``first_head`` is the global number of the pool's first KV head (tensor parallelism)."""
        self.cache = cache
        num_heads = cache.pages.shape[4]
        self.heads = (first_head, first_head + num_heads)
        self.whole = Part((0, cache.pages.shape[1]), self.heads)
        # [num_blocks, layers, ..., heads, ...] each; seen as integers, as bits are what counts.
        pages = cache.pages.view(_word(cache.pages))
        self._row_bytes: dict[Part, int] = {}
        self._tensors = [(pages, 4)]
        self._last_index: tuple[tuple[int, ...], Tensor] | None = None
        if cache.scales is not None:
            self._tensors.append((cache.scales.view(torch.int32), 3))

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.cache.device

    def row_bytes(self, part: Part) -> int:
        """Bytes of one packed block."""
        if part not in self._row_bytes:
            views = self._views(part)
            self._row_bytes[part] = sum(_padded(v[0].numel() * v.element_size()) for v in views)
        return self._row_bytes[part]

    def pack(self, blocks: Sequence[int], part: Part, rows: Tensor) -> None:
        """Copy blocks into uint8 ``rows`` [len(blocks), row_bytes(part)], on any device."""
        for view, target in self._sections(part, rows):
            if view.device.type == "cpu" and target.device.type == "cpu":
                for row, block in enumerate(blocks):
                    target[row].copy_(view[block])
            else:
                target.copy_(view.index_select(0, self._index(blocks)))

    def unpack(self, rows: Tensor, blocks: Sequence[int], part: Part) -> None:
        """Overwrite the part of some blocks with packed rows."""
        for view, source in self._sections(part, rows):
            if view.device.type == "cpu" and source.device.type == "cpu":
                for row, block in enumerate(blocks):
                    view[block].copy_(source[row])
            else:
                view.index_copy_(0, self._index(blocks), source.to(view.device))

    def memory(self, tables: Sequence[Sequence[int]], part: Part) -> list[Tensor | None]:
        """Of each table, its blocks' own bytes, uint8 [n, row_bytes], if they lie as rows do."""
        view = self._views(part)[0]
        size = view[0].numel() * view.element_size()
        if len(self._tensors) > 1 or size % 8 or not view[:1].is_contiguous():
            return [None] * len(tables)
        found: list[Tensor | None] = []
        for table in tables:
            first, count = table[0], len(table)
            rows = view[first : first + count]
            near = count == 1 or (
                rows.is_contiguous() and list(table) == list(range(first, first + count))
            )
            found.append(rows.view(count, -1).view(torch.uint8) if near else None)
        return found

    def runs(self, part: Part) -> tuple[Tensor, int] | None:
        """Where a part is one run of words in each block: int64 [num_blocks, words of a block], and
        the word at which the part begins; None where it is not."""
        view, (pages, _) = self._views(part)[0], self._tensors[0]
        if len(self._tensors) > 1 or pages.dtype != torch.int64 or not view[:1].is_contiguous():
            return None
        shape, strides = (len(pages), pages.stride(0)), (pages.stride(0), 1)
        return pages.as_strided(shape, strides), int(view.storage_offset() - pages.storage_offset())

    def check(self, blocks: Sequence[int], part: Part) -> None:
        """Raise ValueError for a block, layer or head that the pool does not have."""
        self.row_bytes(part)
        limit = self.cache.num_blocks
        if blocks and (min(blocks) < 0 or max(blocks) >= limit):
            raise ValueError(f"block ids must be in 0..{limit - 1}, got {list(blocks)}")

    def _views(self, part: Part) -> list[Tensor]:
        (first, last), (low, high) = part.layers, part.heads
        have = self.whole
        inside = 0 <= first < last <= have.layers[1]
        if not inside or not have.heads[0] <= low < high <= have.heads[1]:
            raise ValueError(f"{part} is not in this pool, which has {have}")
        low, high = low - self.heads[0], high - self.heads[0]
        return [t[:, first:last].narrow(axis, low, high - low) for t, axis in self._tensors]

    def _sections(self, part: Part, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each of the pool's tensors with its share of the rows, shaped alike."""
        sections, start = [], 0
        for view in self._views(part):
            size = view[0].numel() * view.element_size()
            section = (
                rows[:, start : start + size].view(view.dtype).view(len(rows), *view.shape[1:])
            )
            sections.append((view, section))
            if size % 8:
                rows[:, start + size : start + _padded(size)] = 0
            start += _padded(size)
        return sections

    def _index(self, blocks: Sequence[int]) -> Tensor:
        if self.device.type == "cuda":  # in order with the stream that uses it, and no wait
            host = torch.tensor(list(blocks), dtype=torch.int64, pin_memory=True)
            return host.to(self.device, non_blocking=True)
        # The parts of a prompt have the same blocks.
        if self._last_index is None or self._last_index[0] != tuple(blocks):
            index = torch.tensor(list(blocks), dtype=torch.int64, device=self.device)
            self._last_index = tuple(blocks), index
        return self._last_index[1]


def _word(pages: Tensor) -> torch.dtype:
    """The widest integer by which a head can be copied."""
    size = pages.shape[-1] * pages.element_size()
    return torch.int64 if size % 8 == 0 else torch.uint8


def _padded(size: int) -> int:
    return -(-size // 8) * 8
