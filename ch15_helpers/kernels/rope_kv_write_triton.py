# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Rotary embedding and cache write in one launch, a program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=("positions_ptr", "slots_ptr"))
def _rope_kv_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, table_ptr, positions_ptr, slots_ptr,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_block, stride_slot, stride_head,
    PAGE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    K_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(positions_ptr + token), tl.load(slots_ptr + token)
    d = tl.arange(0, HALF_PAD)
    cos = tl.load(table_ptr + position * 2 * HALF + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(table_ptr + position * 2 * HALF + HALF + d, mask=d < HALF, other=0.0)[None, :]
    # Queries and keys are rotated as one block of heads: each lane reads one or the other.
    head = tl.arange(0, HEADS_PAD)
    k_head = head - Q_HEADS
    is_q = (head < Q_HEADS)[:, None] & (d < HALF)[None, :]
    is_k = (k_head >= 0)[:, None] & (k_head < K_HEADS)[:, None] & (d < HALF)[None, :]
    q_in = q_ptr + token * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    k_in = k_ptr + token * stride_k_token + k_head[:, None] * stride_k_head + d[None, :]
    low = tl.load(q_in, mask=is_q, other=0.0).to(tl.float32)
    low += tl.load(k_in, mask=is_k, other=0.0).to(tl.float32)
    high = tl.load(q_in + HALF, mask=is_q, other=0.0).to(tl.float32)
    high += tl.load(k_in + HALF, mask=is_k, other=0.0).to(tl.float32)
    new_low = (low * cos - high * sin).to(q_out_ptr.dtype.element_ty)
    new_high = (high * cos + low * sin).to(q_out_ptr.dtype.element_ty)
    q_out = q_out_ptr + (token * Q_HEADS + head[:, None]) * 2 * HALF + d[None, :]
    tl.store(q_out, new_low, mask=is_q)
    tl.store(q_out + HALF, new_high, mask=is_q)
    if slot < 0:
        return
    cache_type = k_cache_ptr.dtype.element_ty
    target = slot // PAGE * stride_block + slot % PAGE * stride_slot
    k_out = k_cache_ptr + target + k_head[:, None] * stride_head + d[None, :]
    tl.store(k_out, new_low.to(cache_type), mask=is_k)
    tl.store(k_out + HALF, new_high.to(cache_type), mask=is_k)
    v_head, channel = tl.arange(0, K_PAD)[:, None], tl.arange(0, 2 * HALF_PAD)[None, :]
    mask = (v_head < K_HEADS) & (channel < 2 * HALF)
    v_in = v_ptr + token * stride_v_token + v_head * stride_v_head + channel
    v_out = v_cache_ptr + target + v_head * stride_head + channel
    tl.store(v_out, tl.load(v_in, mask=mask).to(cache_type), mask=mask)


def rope_and_write_kv_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos_sin_cache: Tensor,
    positions: Tensor, slot_mapping: Tensor,
) -> Tensor:  # fmt: skip
    """See :func:`ch15_helpers.kernels.rope_kv_write.rope_and_write_kv`.

    Last axes are contiguous, and both caches have equal strides.
    """
    num_tokens, q_heads, head_dim = q.shape
    k_heads, half = k.shape[1], head_dim // 2
    q_out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    _rope_kv_kernel[(num_tokens,)](
        q, k, v, q_out, k_cache, v_cache, cos_sin_cache, positions, slot_mapping,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), PAGE=k_cache.shape[1],
        Q_HEADS=q_heads, K_HEADS=k_heads, HEADS_PAD=triton.next_power_of_2(q_heads + k_heads),
        K_PAD=triton.next_power_of_2(k_heads), HALF=half, HALF_PAD=triton.next_power_of_2(half),
        num_warps=4,
    )  # fmt: skip
    return q_out
