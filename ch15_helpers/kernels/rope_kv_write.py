"""Rotates queries and keys and writes keys and values into the paged cache, together.

Apart, the rotated keys go to memory and come back to be written into their slots, and a decode
step starts one more kernel in each layer. Bytes: queries, keys and values once in each direction.
Operations: three for each channel of a query or key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton
from ch15_helpers.kernels.kv_write import write_kv
from ch15_helpers.kernels.rope import apply_rope


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rows: tuple[Tensor, Tensor] | None = None,
    scratch: dict[Any, Any] | None = None,
) -> Tensor:
    """:func:`~.rope.apply_rope`, then :func:`~.kv_write.write_kv` of the rotated keys.

    Args:
        q: [num_tokens, num_heads, head_dim], not yet rotated.
        k, v: [num_tokens, num_kv_heads, head_dim]; keys not yet rotated.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], any strides; written.
        cos_sin_cache, positions, rows: see :func:`~.rope.apply_rope`.
        slot_mapping, scratch: see :func:`~.kv_write.write_kv`; the query of a row with slot -1
            is rotated all the same.

    Returns:
        The rotated q, a new tensor.
    """
    if use_triton(q, k, v, k_cache, v_cache) and k_cache.stride() == v_cache.stride():
        from ch15_helpers.kernels.rope_kv_write_triton import rope_and_write_kv_triton

        return rope_and_write_kv_triton(
            q, k, v, k_cache, v_cache, cos_sin_cache, positions, slot_mapping
        )
    q, k = apply_rope(q, k, cos_sin_cache, positions, rows)
    write_kv(k_cache, v_cache, k, v, slot_mapping, scratch)
    return q
