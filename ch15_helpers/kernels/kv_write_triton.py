# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Writes keys and values into their pages in one launch; padding rows are skipped on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))
def _write_kv_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, slots_ptr,
    stride_block, stride_slot, stride_head, stride_k_token, stride_k_head,
    stride_v_token, stride_v_head,
    PAGE: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    head, d = tl.arange(0, HEADS_PAD), tl.arange(0, D_PAD)
    mask = (head < HEADS)[:, None] & (d < D)[None, :]
    k_row = k_ptr + token * stride_k_token + head[:, None] * stride_k_head + d[None, :]
    v_row = v_ptr + token * stride_v_token + head[:, None] * stride_v_head + d[None, :]
    k = tl.load(k_row, mask=mask)
    v = tl.load(v_row, mask=mask)
    target = (slot // PAGE) * stride_block + (slot % PAGE) * stride_slot
    target += head[:, None] * stride_head + d[None, :]
    tl.store(k_cache_ptr + target, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + target, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def write_kv_triton(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor
) -> None:
    """See :func:`ch15_helpers.kernels.kv_write.write_kv`; last axes contiguous, equal strides."""
    num_tokens, heads, head_dim = k.shape
    _write_kv_kernel[(num_tokens,)](
        k_cache, v_cache, k, v, slot_mapping,
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        PAGE=k_cache.shape[1], HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
