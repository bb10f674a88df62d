"""The paged KV storage itself: one tensor, addressed by block id.

Block-major (the default) keeps one block's keys and values of *all* layers in one contiguous run
of bytes, so that offloading or handing over a block is one copy; layer-major keeps each layer's
pool together, as vLLM does. Both present the same six-dimensional view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ch15_helpers.errors import CapacityError
from ch15_helpers.kernels.kv_quant import is_quantised, padded_scale_bytes
from ch15_helpers.kv.blocks import CopyOp

Layout = Literal["block_major", "layer_major"]
Damage = Literal["scramble", "zero"]


class KVGeometry(Protocol):
    """What the cache must know of a model; ModelConfig has it."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def block_bytes(geometry: KVGeometry, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block across all layers, keys and values (2 MiB: Llama-3-8B, 16, bf16).

    The scales of a quantised block (int8, float8_e4m3fn) are part of it.
    """
    layers, heads = geometry.num_hidden_layers, geometry.num_key_value_heads
    values = 2 * layers * heads * geometry.head_dim * block_size * dtype.itemsize
    if is_quantised(dtype):
        values += padded_scale_bytes(layers, heads, geometry.head_dim)
    return values


def num_blocks_for_memory(
    budget_bytes: int, geometry: KVGeometry, block_size: int, dtype: torch.dtype
) -> int:
    """How many blocks fit in ``budget_bytes``. Raises CapacityError when not even one does."""
    size = block_bytes(geometry, block_size, dtype)
    blocks = budget_bytes // size
    if blocks < 1:
        raise CapacityError(
            f"{budget_bytes} bytes are left for the KV cache, one block of {block_size} tokens "
            f"takes {size}; free memory, or use a smaller block_size or model",
            blocks_needed=1,
            blocks_total=0,
        )
    return int(blocks)


class PagedKVCache:
    """A pool of KV blocks on one device.

    Attributes:
        pages: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]; index 0 of the
            third dimension is K, 1 is V. A strided view when the layout is layer-major.
        scales: None; a :class:`~ch15_helpers.kv.quantised.QuantisedKVCache` has them.
        content: [num_blocks, ...], all that a block consists of, for copies of whole blocks. Here
            it is ``pages``; with scales it is rows of bytes.
        block_bytes: bytes of one block across all layers, scales included.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        num_blocks: int,
        block_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: Layout = "block_major",
        pin_memory: bool = False,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}"
            )
        if layout not in ("block_major", "layer_major"):
            raise ValueError(f"layout must be block_major or layer_major, got {layout!r}")
        self.layout: Layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes(geometry, block_size, dtype)
        self.pages: Tensor
        self.scales: Tensor | None = None
        self.content: Tensor
        self._allocate(geometry, dtype, torch.device(device), pin_memory)

    def _allocate(
        self, geometry: KVGeometry, dtype: torch.dtype, device: torch.device, pin_memory: bool
    ) -> None:
        if is_quantised(dtype):
            raise ValueError(f"{dtype} needs scales: use make_kv_cache or QuantisedKVCache")
        layers, heads = geometry.num_hidden_layers, geometry.num_key_value_heads
        tail = (self.block_size, heads, geometry.head_dim)
        block_major = self.layout == "block_major"
        head = (self.num_blocks, layers, 2) if block_major else (layers, 2, self.num_blocks)
        # Zeros, not garbage: masked attention multiplies stale values by 0, and 0 x NaN is NaN.
        # On CPU they cost nothing until touched (calloc).
        storage = torch.zeros((*head, *tail), dtype=dtype, device=device, pin_memory=pin_memory)
        self.pages = storage if block_major else storage.permute(2, 0, 1, 3, 4, 5)
        self.content = self.pages

    @property
    def device(self) -> torch.device:
        """Where the pool lives."""
        return self.pages.device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of keys and values."""
        return self.pages.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.block_bytes * self.num_blocks

    def copy_blocks(self, pairs: Sequence[CopyOp]) -> None:
        """Copy whole blocks inside this pool, as if all at once (copy-on-write).

        Sources are read before any destination is written; destinations must be distinct.
        """
        if pairs:
            source, target = (self._index(ids) for ids in zip(*pairs, strict=True))
            self.content.index_copy_(0, target, self.content.index_select(0, source))

    def read_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """Contents of ``n`` blocks, contiguous [n, layers, 2, block_size, kv_heads, head_dim].

        Of a quantised cache: uint8 [n, block_bytes], values and scales.
        """
        return self.content.index_select(0, self._index(block_ids)).contiguous()

    def write_blocks(self, block_ids: Sequence[int], data: Tensor) -> None:
        """Overwrite some blocks with ``data``, shaped as ``read_blocks`` returns it."""
        expected = (len(block_ids), *self.content.shape[1:])
        if tuple(data.shape) != expected:
            raise ValueError(f"data has shape {tuple(data.shape)}, expected {expected}")
        data = data.to(self.device, self.content.dtype)
        self.content.index_copy_(0, self._index(block_ids), data)

    def corrupt_block(self, block_id: int, how: Damage = "scramble") -> None:
        """Damage one block on purpose, to prove that a same-tokens check bites.

        ``scramble`` negates and shifts every value (a corrupted block), ``zero`` erases it (a
        block that never arrived). For checks only: nothing in the engine calls it.
        """
        block = self.pages[block_id]
        if how == "scramble":
            block.neg_().add_(1.0)
        elif how == "zero":
            block.zero_()
        else:
            raise ValueError(f"how must be scramble or zero, got {how!r}")

    def exchange_blocks(self, first: int, second: int) -> None:
        """Exchange the contents of two blocks (a mixed-up table), for the same kind of check.

        Take them from two sequences. Two full blocks of one sequence may trade places without
        changing any decode: cached keys carry their positions, and attention sums over them in
        any order.
        """
        self.copy_blocks([(first, second), (second, first)])

    def _index(self, block_ids: Iterable[int]) -> Tensor:
        ids = list(block_ids)
        if ids and (min(ids) < 0 or max(ids) >= self.num_blocks):
            raise IndexError(f"block ids must be in 0..{self.num_blocks - 1}, got {ids}")
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def swap_blocks(source: PagedKVCache, target: PagedKVCache, pairs: Sequence[CopyOp]) -> None:
    """Copy blocks between two pools, normally the device's and the host's.

    Runs of neighbouring ids go as one copy. With a pinned host pool the copies are asynchronous
    on the current stream: later work on that stream sees them, and the host must synchronise
    before it reads. Source and target must be different pools.
    """
    same_shape = source.pages.shape[1:] == target.pages.shape[1:]
    if not same_shape or source.dtype != target.dtype:
        raise ValueError(
            f"pools differ: {tuple(source.pages.shape[1:])} {source.dtype} against "
            f"{tuple(target.pages.shape[1:])} {target.dtype}"
        )
    for first, second, length in _runs(pairs):
        if min(first, second) < 0 or first + length > source.num_blocks:
            raise IndexError(f"source blocks {first}..{first + length - 1} do not exist")
        if second + length > target.num_blocks:
            raise IndexError(f"target blocks {second}..{second + length - 1} do not exist")
        target.content[second : second + length].copy_(
            source.content[first : first + length], non_blocking=True
        )


def _runs(pairs: Sequence[CopyOp]) -> Iterable[tuple[int, int, int]]:
    """Group pairs into (first source, first target, length) where both ids count up by one."""
    start = 0
    for end in range(1, len(pairs) + 1):
        if end < len(pairs):
            (source, target), (next_source, next_target) = pairs[end - 1], pairs[end]
            if next_source == source + 1 and next_target == target + 1:
                continue
        yield pairs[start][0], pairs[start][1], end - start
        start = end
