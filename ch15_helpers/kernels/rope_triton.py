# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Rotary embeddings of queries and keys in one launch: one read and one write of each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=("positions_ptr",))
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, table_ptr, positions_ptr,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    d = tl.arange(0, HALF_PAD)
    cos = tl.load(table_ptr + position * 2 * HALF + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(table_ptr + position * 2 * HALF + HALF + d, mask=d < HALF, other=0.0)[None, :]
    head = tl.arange(0, HEADS_PAD)
    is_q = (head < Q_HEADS)[:, None] & (d < HALF)[None, :]
    is_k = (head >= Q_HEADS)[:, None] & (head < Q_HEADS + K_HEADS)[:, None] & (d < HALF)[None, :]
    q_in = q_ptr + token * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    k_head = head - Q_HEADS
    k_in = k_ptr + token * stride_k_token + k_head[:, None] * stride_k_head + d[None, :]
    low = tl.load(q_in, mask=is_q, other=0.0).to(tl.float32)
    low += tl.load(k_in, mask=is_k, other=0.0).to(tl.float32)
    high = tl.load(q_in + HALF, mask=is_q, other=0.0).to(tl.float32)
    high += tl.load(k_in + HALF, mask=is_k, other=0.0).to(tl.float32)
    new_low = (low * cos - high * sin).to(q_out_ptr.dtype.element_ty)
    new_high = (high * cos + low * sin).to(q_out_ptr.dtype.element_ty)
    q_out = q_out_ptr + (token * Q_HEADS + head[:, None]) * 2 * HALF + d[None, :]
    k_out = k_out_ptr + (token * K_HEADS + k_head[:, None]) * 2 * HALF + d[None, :]
    tl.store(q_out, new_low, mask=is_q)
    tl.store(q_out + HALF, new_high, mask=is_q)
    tl.store(k_out, new_low, mask=is_k)
    tl.store(k_out + HALF, new_high, mask=is_k)


def apply_rope_triton(
    q: Tensor, k: Tensor, cos_sin_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`ch15_helpers.kernels.rope.apply_rope`; the last axes of q and k are contiguous."""
    num_tokens, q_heads, head_dim = q.shape
    k_heads, half = k.shape[1], head_dim // 2
    q_out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    k_out = torch.empty(k.shape, device=k.device, dtype=k.dtype)
    _rope_kernel[(num_tokens,)](
        q, k, q_out, k_out, cos_sin_cache, positions,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        Q_HEADS=q_heads, K_HEADS=k_heads, HEADS_PAD=triton.next_power_of_2(q_heads + k_heads),
        HALF=half, HALF_PAD=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return q_out, k_out
