"""Rotates queries and keys and writes keys and values into the paged cache, together.

Apart, the rotated keys go to memory and come back to be written into their slots, and a decode
step starts one more kernel in each layer. Bytes: queries, keys and values once in each direction.
Operations: three for each channel of a query or key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ch15_helpers.kernels.cpu_library import cpu_library, threads_for
from ch15_helpers.kernels.dispatch import use_triton
from ch15_helpers.kernels.kv_write import write_kv
from ch15_helpers.kernels.rope import apply_rope, rope_rows

_FUNCTIONS = {torch.float32: "ch15_rope_write", torch.bfloat16: "ch15_rope_write_bfloat16"}


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
    if _can_compile(q, k, v, k_cache, v_cache):
        rows = rope_rows(cos_sin_cache, positions) if rows is None else rows
        scratch = {} if scratch is None else scratch
        return _compiled(q, k, v, k_cache, v_cache, rows, slot_mapping, scratch)
    q, k = apply_rope(q, k, cos_sin_cache, positions, rows)
    write_kv(k_cache, v_cache, k, v, slot_mapping, scratch)
    return q


def _can_compile(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether ``cpu_pointwise.cpp`` takes these: slices of one projection on the CPU."""
    if q.device.type != "cpu" or q.dtype not in _FUNCTIONS or cpu_library() is None:
        return False
    dim, caches = q.shape[2], (k_cache, v_cache)
    packed = q.stride() == k.stride() == v.stride() and q.stride()[1:] == (dim, 1)
    same = all(t.dtype == q.dtype for t in (k, v, *caches)) and k.shape == v.shape
    pages = k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    return packed and same and pages and k_cache.shape == v_cache.shape and dim % 2 == 0


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: tuple[Tensor, Tensor],
    slot_mapping: Tensor,
    scratch: dict[Any, Any],
) -> Tensor:
    num_blocks, page = k_cache.shape[:2]
    key = ("rope_write", num_blocks, page)
    if key not in scratch:
        # The kernel writes where it is told to; torch would have checked.
        if len(slot_mapping) and int(slot_mapping.max()) >= num_blocks * page:
            raise IndexError(f"a slot lies outside {num_blocks} blocks of {page} tokens")
        scratch[key] = slot_mapping.contiguous()
    library, out = cpu_library(), torch.empty(q.shape, dtype=q.dtype)
    assert library is not None
    cos, sin = (row.contiguous() for row in rows)
    getattr(library, _FUNCTIONS[q.dtype])(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        scratch[key].data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.stride(0), page, *k_cache.stride()[:3],
        threads_for(q.numel()),
    )  # fmt: skip
    return out
