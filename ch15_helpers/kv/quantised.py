"""KV blocks in one byte a value: FP8 (E4M3) or INT8, with a scale for each block and head.

A block is one contiguous run of bytes, as in the plain block-major cache: first the values of all
layers, then the block's scales. So whatever moves a block (copy-on-write, swap, offload, handover)
moves its scales in the same copy and cannot forget them. How values are encoded, how a block is
appended to, and the bounds on the error: :mod:`ch15_helpers.kernels.kv_quant`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.kv_quant import (
    dequantise,
    is_quantised,
    quantise,
    resolve_kv_dtype,
)
from ch15_helpers.kv.cache import Damage, KVGeometry, Layout, PagedKVCache


class QuantisedKVCache(PagedKVCache):
    """A pool of KV blocks whose values take one byte each.

    Attributes:
        pages: int8 or float8_e4m3fn, shaped as in :class:`PagedKVCache`; a strided view.
        scales: float32 [num_blocks, num_layers, 2, num_kv_heads], a strided view. 0 where a head
            of a block has nothing but zeros, NaN where it was given a value that is not finite.
        content: uint8 [num_blocks, block_bytes]: pages and scales, and nothing else.
    """

    scales: Tensor

    def _allocate(
        self, geometry: KVGeometry, dtype: torch.dtype, device: torch.device, pin_memory: bool
    ) -> None:
        if not is_quantised(dtype):
            raise ValueError(f"{dtype} is not quantised: use make_kv_cache or PagedKVCache")
        if self.layout != "block_major":
            raise ValueError(
                f"a {dtype} cache keeps each block's scales beside its values, so its layout must "
                f"be block_major, not {self.layout}"
            )
        layers, heads = geometry.num_hidden_layers, geometry.num_key_value_heads
        shape = (self.num_blocks, layers, 2, self.block_size, heads, geometry.head_dim)
        end = 2 * layers * heads * geometry.head_dim * self.block_size
        size = (self.num_blocks, self.block_bytes)
        self.content = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pin_memory)
        self.pages = self.content[:, :end].view(dtype).view(shape)
        scales = self.content[:, end : end + 4 * 2 * layers * heads].view(torch.float32)
        self.scales = scales.view(self.num_blocks, layers, 2, heads)

    def dequantised(self, block_id: int) -> Tensor:
        """float32 [num_layers, 2, block_size, num_kv_heads, head_dim]: what attention reads."""
        stored = self.pages[block_id].view(torch.uint8).view(self.dtype)
        return dequantise(stored, self.scales[block_id])

    def store(self, block_id: int, values: Tensor) -> None:
        """Encode a whole block; ``values`` shaped as :meth:`dequantised` returns them."""
        stored, scales = quantise(values, self.dtype)
        self.pages[block_id].view(torch.uint8).copy_(stored.view(torch.uint8))
        self.scales[block_id].copy_(scales)

    def corrupt_block(self, block_id: int, how: Damage = "scramble") -> None:
        """Damage one block on purpose; see :meth:`PagedKVCache.corrupt_block`."""
        if how == "scramble":
            self.store(block_id, 1.0 - self.dequantised(block_id))
        elif how == "zero":
            self.content[block_id].zero_()
        else:
            raise ValueError(f"how must be scramble or zero, got {how!r}")


def make_kv_cache(
    geometry: KVGeometry,
    num_blocks: int,
    block_size: int = 16,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    layout: Layout = "block_major",
    pin_memory: bool = False,
) -> PagedKVCache:
    """The pool for an element type: a plain one, or a quantised one with its scales.

    Args:
        dtype: a torch dtype, ``"fp8_e4m3"`` or ``"int8"``.

    Raises:
        ValueError: an unknown type, or a quantised one in layer-major layout.
    """
    resolved = resolve_kv_dtype(dtype)
    cls = QuantisedKVCache if is_quantised(resolved) else PagedKVCache
    return cls(
        geometry,
        num_blocks,
        block_size,
        dtype=resolved,
        device=device,
        layout=layout,
        pin_memory=pin_memory,
    )
