# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton reads the kernels' signatures itself: constexpr, pointers and strides have no Python types.
"""Paged attention of prompts and chunks for any GPU and shape, straight from the pages.

FlashAttention-2 (Dao, 2023) with the query heads of one KV head packed into the rows of a tile,
so that each K and V tile is read once for all of them. Long prompts on Hopper take
:mod:`ch15_helpers.kernels.paged_prefill_triton_hopper` instead.

Operations: ``4 * num_heads * head_dim`` for each (query, visible key) pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ch15_helpers.kernels.attention_tile_triton import (
    LOG2E,
    METADATA,
    MIN_SEQS,
    VARYING,
    attend,
    load_tile,
)
from ch15_helpers.kernels.batch import BatchMetadata


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=METADATA)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, context_ptr,
    num_seqs, scale_log2, stride_q_token, stride_q_head, stride_block, stride_token, stride_kv_head,
    stride_scale, stride_scale_head, stride_table, stride_out_token, stride_out_head,
    SEQS: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    s = tl.arange(0, SEQS)
    begin = tl.load(starts_ptr + s, mask=s < num_seqs, other=0)
    lens = tl.load(starts_ptr + s + 1, mask=s < num_seqs, other=0) - begin
    tiles = tl.cdiv(lens, BLOCK_Q)
    ends = tl.cumsum(tiles, 0)
    seq = tl.sum((ends <= tile).to(tl.int32))
    if seq >= num_seqs:
        return
    q_begin = tl.load(starts_ptr + seq)
    q_len = tl.load(starts_ptr + seq + 1) - q_begin
    context = tl.load(context_ptr + seq)
    # Longest rows first: the tiles that see most keys must not be the last to start.
    local = tl.sum(tl.where(s == seq, ends, 0)) - 1 - tile
    rows = tl.arange(0, BLOCK_Q * GROUP_PAD)
    token = local * BLOCK_Q + rows // GROUP_PAD
    head = rows % GROUP_PAD
    row_ok = (token < q_len) & (head < GROUP)
    position = context - q_len + token
    d = tl.arange(0, D_PAD)
    mask = row_ok[:, None] & (d < D)[None, :]
    q_offset = (q_begin + token).to(tl.int64) * stride_q_token + (
        kv_head * GROUP + head) * stride_q_head  # fmt: skip
    q = tl.load(q_ptr + q_offset[:, None] + d[None, :], mask=mask, other=0.0)
    m = tl.full([BLOCK_Q * GROUP_PAD], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_Q * GROUP_PAD], tl.float32)
    acc = tl.zeros([BLOCK_Q * GROUP_PAD, D_PAD], tl.float32)
    table = table_ptr + seq.to(tl.int64) * stride_table
    k_ptr += kv_head * stride_kv_head
    v_ptr += kv_head * stride_kv_head
    k_scale_ptr += kv_head * stride_scale_head
    v_scale_ptr += kv_head * stride_scale_head
    stop = tl.minimum(context, context - q_len + (local + 1) * BLOCK_Q)
    for n in range(0, stop, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        ok = tokens < context
        blocks = tl.load(table + tokens // PAGE, mask=ok, other=0)
        k = load_tile(k_ptr, blocks, tokens, ok, stride_block, stride_token, q.dtype,
                      PAGE, D, D_PAD)  # fmt: skip
        v = load_tile(v_ptr, blocks, tokens, ok, stride_block, stride_token, q.dtype,
                      PAGE, D, D_PAD)  # fmt: skip
        visible = ok[None, :] & (tokens[None, :] <= position[:, None])
        k_factor, v_factor = scale_log2, 1.0
        if SCALED:
            at = blocks.to(tl.int64) * stride_scale
            k_factor = scale_log2 * tl.load(k_scale_ptr + at, mask=ok, other=0.0)[None, :]
            v_factor = tl.load(v_scale_ptr + at, mask=ok, other=0.0)[None, :]
        m, denom, acc = attend(q, k, v, visible, k_factor, v_factor, m, denom, acc, PRECISION)
    out = acc / tl.where(denom > 0.0, denom, 1.0)[:, None]
    o_offset = (q_begin + token).to(tl.int64) * stride_out_token + (
        kv_head * GROUP + head) * stride_out_head  # fmt: skip
    tl.store(out_ptr + o_offset[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of query chunks of any length; see ``paged_attention_triton`` for the arguments."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = batch.num_seqs
    page, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    group_pad = triton.next_power_of_2(group)
    d_pad = max(16, triton.next_power_of_2(head_dim))
    wide = q.dtype == torch.float32 or d_pad > 128
    block_n, block_m = (32, 64) if wide else (64, 128)
    block_q = max(1, block_m // group_pad)
    out = torch.empty_like(q) if out is None else out
    # An upper bound that needs no copy from the device; the surplus programs return at once.
    max_tiles = num_tokens // block_q + num_seqs
    _prefill_kernel[(max_tiles, num_kv_heads)](
        q, k_cache, v_cache, out, q if k_scale is None else k_scale,
        q if v_scale is None else v_scale, batch.block_tables, batch.query_starts,
        batch.context_lens, num_seqs, scale * LOG2E, q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        *((0, 0) if k_scale is None else k_scale.stride()), batch.block_tables.stride(0),
        out.stride(0), out.stride(1),
        SEQS=triton.next_power_of_2(max(num_seqs, MIN_SEQS)), PAGE=page, GROUP=group,
        GROUP_PAD=group_pad, BLOCK_Q=block_q, D=head_dim, D_PAD=d_pad, BLOCK_N=block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", SCALED=k_scale is not None,
        num_warps=4 if wide else 8, num_stages=2 if wide else 3,
    )  # fmt: skip
    return out
