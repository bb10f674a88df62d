"""A block's bytes: what a tier keeps of it, in one order whatever the pool's layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ch15_helpers.kv.cache import PagedKVCache


class BlockPayload:
    """Maps blocks of a cache to rows of bytes.

    A row is the block in block-major order, [num_layers, 2, block_size, num_kv_heads, head_dim],
    then, for a quantised cache, its scales (``QuantisedKVCache.content``). So a row is the same for
    either layout.

    Attributes:
        num_bytes: length of a row.
        parts: the pool's tensors, [num_blocks, ...], seen as words of 8 bytes where that fits.
        geometry: shapes and types in words; rows of equal geometry fit into each other's pools.
        contiguous: whether every part of a block is one run of memory.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        content: Tensor | None = getattr(cache, "content", None)
        tensors = [cache.pages] if content is None else [content]
        self._spans: list[tuple[int, int]] = []
        start = 0
        for tensor in tensors:
            stop = start + math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
            self._spans.append((start, stop))
            start = stop
        self.num_bytes = start
        kind = str(cache.dtype).removeprefix("torch.")
        self.geometry = f"{kind} {list(cache.pages.shape[1:])}, {start} bytes"
        self.contiguous = all(tensor[0].is_contiguous() for tensor in tensors)
        self.parts = [
            tensor.view(self._word(tensor, *span))
            for tensor, span in zip(tensors, self._spans, strict=True)
        ]

    def _word(self, tensor: Tensor, start: int, stop: int) -> torch.dtype:
        """The widest integer that the part can be copied by: content does not matter here."""
        last = tensor.shape[-1] * tensor.dtype.itemsize
        return torch.uint8 if (start | stop | last | self.num_bytes) % 8 else torch.int64

    def views(self, rows: Tensor) -> list[Tensor]:
        """Each part's share of uint8 rows [n, num_bytes], typed and shaped like the part."""
        return [
            torch.unflatten(rows[:, start:stop].view(part.dtype), 1, part.shape[1:])
            for part, (start, stop) in zip(self.parts, self._spans, strict=True)
        ]

    def flat(self) -> list[tuple[Tensor, int, int]]:
        """For a contiguous pool: (bytes [num_blocks, size], start, stop) of each part."""
        return [
            (part.view(len(part), -1).view(torch.uint8), start, stop)
            for part, (start, stop) in zip(self.parts, self._spans, strict=True)
        ]
