# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton reads the kernels' signatures itself: constexpr, pointers and strides have no Python types.
"""Paged attention in Triton: balanced decode over the whole batch, and tiled chunked prefill.

Decode is bound by the bytes of K and V. Each tile of ``BLOCK_N`` tokens of every sequence is one
unit of work, and the units of the whole batch are dealt out evenly to as many workers as the chip
holds (stream-K, Osama et al. 2023, applied to split-KV decoding, FlashDecoding, Dao et al. 2023).
A worker that ends inside a sequence leaves a partial softmax; a second kernel merges them. Skewed
context lengths therefore cost no more than even ones, and nothing depends on a length that the
host knows, so the launch can be captured in a CUDA graph.

Prefill is FlashAttention-2 (Dao, 2023) with the query heads of one KV head packed into the rows
of a tile, so that each K and V tile is read once for all of them.

Bytes of decode: ``2 * sum(context_lens) * num_kv_heads * head_dim * element_size``.
Operations of prefill: ``4 * num_heads * head_dim`` for each (query, visible key) pair.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata

_LOG2E = 1.4426950408889634
# Values and alignments that change from step to step: a kernel compiled anew in the middle of
# serving would stall every request in the batch for about a second.
_VARYING = ("num_seqs", "stride_table")
_METADATA = ("table_ptr", "starts_ptr", "context_ptr")
_MIN_SEQS = 64


@triton.jit
def _load_rows(cache_ptr, table_ptr, tokens, in_range, stride_block, stride_token,
               PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """Gathers the rows ``tokens`` of one sequence and KV head through its block table."""
    block = tl.load(table_ptr + tokens // PAGE, mask=in_range, other=0).to(tl.int64)
    rows = block * stride_block + (tokens % PAGE) * stride_token
    d = tl.arange(0, D_PAD)
    mask = in_range[:, None] & (d < D)[None, :]
    return tl.load(cache_ptr + rows[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(q, k, v, visible, scale_log2, m, denom, acc, PRECISION: tl.constexpr):
    """One tile of online softmax in base two; ``visible`` masks keys that a row must not see."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen no key yet keeps -inf; subtracting it from itself would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    denom = denom * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return m_new, denom, acc


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_METADATA)
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, part_acc_ptr, part_ml_ptr,
    num_seqs, scale_log2, stride_q_token, stride_q_head, stride_block, stride_token, stride_kv_head,
    stride_table,
    SEQS: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    worker, kv_head = tl.program_id(0), tl.program_id(1)
    num_workers, num_kv_heads = tl.num_programs(0), tl.num_programs(1)
    s = tl.arange(0, SEQS)
    tiles = tl.cdiv(tl.load(context_ptr + s, mask=s < num_seqs, other=0), BLOCK_N)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles)
    # With fewer tiles than workers each active worker gets one, so no partial stays unwritten.
    active = tl.minimum(num_workers, total)
    if worker >= active:
        return
    tile = (worker * total) // active
    last = ((worker + 1) * total) // active
    seq = tl.sum((ends <= tile).to(tl.int32))
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    q_mask = (rows < GROUP)[:, None] & (d < D)[None, :]
    k_ptr += kv_head * stride_kv_head
    v_ptr += kv_head * stride_kv_head
    while tile < last:
        context = tl.load(context_ptr + seq)
        seq_end = tl.sum(tl.where(s == seq, ends, 0))
        seq_start = seq_end - tl.cdiv(context, BLOCK_N)
        stop = tl.minimum(last, seq_end)
        q_row = q_ptr + seq * stride_q_token + kv_head * GROUP * stride_q_head
        q = tl.load(q_row + rows[:, None] * stride_q_head + d[None, :], mask=q_mask, other=0.0)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        denom = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D_PAD], tl.float32)
        table = table_ptr + seq.to(tl.int64) * stride_table
        for n in range((tile - seq_start) * BLOCK_N, (stop - seq_start) * BLOCK_N, BLOCK_N):
            tokens = n + tl.arange(0, BLOCK_N)
            ok = tokens < context
            k = _load_rows(k_ptr, table, tokens, ok, stride_block, stride_token, PAGE, D, D_PAD)
            v = _load_rows(v_ptr, table, tokens, ok, stride_block, stride_token, PAGE, D, D_PAD)
            m, denom, acc = _attend(q, k, v, ok[None, :], scale_log2, m, denom, acc, PRECISION)
        # (worker, seq) only ever grows in one coordinate or both, so the sum numbers the partials.
        part = ((worker + seq) * num_kv_heads + kv_head) * ROWS + rows
        tl.store(part_acc_ptr + part[:, None] * D_PAD + d[None, :], acc)
        tl.store(part_ml_ptr + part * 2, m)
        tl.store(part_ml_ptr + part * 2 + 1, denom)
        tile = stop
        seq += 1


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_METADATA)
def _merge_kernel(
    out_ptr, part_acc_ptr, part_ml_ptr, context_ptr, num_seqs, num_workers,
    stride_out_token, stride_out_head,
    SEQS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seq, kv_head = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    s = tl.arange(0, SEQS)
    tiles = tl.cdiv(tl.load(context_ptr + s, mask=s < num_seqs, other=0), BLOCK_N)
    total = tl.sum(tiles)
    begin = tl.sum(tl.where(s < seq, tiles, 0))
    end = begin + tl.sum(tl.where(s == seq, tiles, 0))
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    denom = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    if end > begin:
        # Worker w starts at tile w * total // active; these invert that.
        active = tl.minimum(num_workers, total)
        first = ((begin + 1) * active - 1) // total
        final = (end * active - 1) // total
        for worker in range(first, final + 1):
            part = ((worker + seq) * num_kv_heads + kv_head) * ROWS + rows
            m_part = tl.load(part_ml_ptr + part * 2)
            l_part = tl.load(part_ml_ptr + part * 2 + 1)
            acc_part = tl.load(part_acc_ptr + part[:, None] * D_PAD + d[None, :])
            m_new = tl.maximum(m, m_part)
            alpha, beta = tl.exp2(m - m_new), tl.exp2(m_part - m_new)
            denom = denom * alpha + l_part * beta
            acc = acc * alpha[:, None] + acc_part * beta[:, None]
            m = m_new
    out = acc / tl.where(denom > 0.0, denom, 1.0)[:, None]
    out_row = out_ptr + seq * stride_out_token + kv_head * GROUP * stride_out_head
    mask = (rows < GROUP)[:, None] & (d < D)[None, :]
    tl.store(out_row + rows[:, None] * stride_out_head + d[None, :],
             out.to(out_ptr.dtype.element_ty), mask=mask)  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_METADATA)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, starts_ptr, context_ptr,
    num_seqs, scale_log2, stride_q_token, stride_q_head, stride_block, stride_token, stride_kv_head,
    stride_table, stride_out_token, stride_out_head,
    SEQS: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
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
    stop = tl.minimum(context, context - q_len + (local + 1) * BLOCK_Q)
    for n in range(0, stop, BLOCK_N):
        tokens = n + tl.arange(0, BLOCK_N)
        ok = tokens < context
        k = _load_rows(k_ptr, table, tokens, ok, stride_block, stride_token, PAGE, D, D_PAD)
        v = _load_rows(v_ptr, table, tokens, ok, stride_block, stride_token, PAGE, D, D_PAD)
        visible = ok[None, :] & (tokens[None, :] <= position[:, None])
        m, denom, acc = _attend(q, k, v, visible, scale_log2, m, denom, acc, PRECISION)
    out = acc / tl.where(denom > 0.0, denom, 1.0)[:, None]
    o_offset = (q_begin + token).to(tl.int64) * stride_out_token + (
        kv_head * GROUP + head) * stride_out_head  # fmt: skip
    tl.store(out_ptr + o_offset[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter, used to debug without a GPU.
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _decode(q: Tensor, k: Tensor, v: Tensor, batch: BatchMetadata, scale: float) -> Tensor:
    num_seqs, num_heads, head_dim = q.shape
    page, num_kv_heads = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    rows = max(16, triton.next_power_of_2(group))
    d_pad = max(16, triton.next_power_of_2(head_dim))
    block_n = 32 if q.dtype == torch.float32 or d_pad > 128 else 64
    per_processor = 1 if d_pad > 128 else 3
    workers = max(1, _num_processors(q.device) * per_processor // num_kv_heads)
    parts = (workers + num_seqs) * num_kv_heads * rows
    part_acc = torch.empty((parts, d_pad), device=q.device, dtype=torch.float32)
    part_ml = torch.empty((parts, 2), device=q.device, dtype=torch.float32)
    out = torch.empty_like(q)
    seqs = triton.next_power_of_2(max(num_seqs, _MIN_SEQS))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    _decode_kernel[(workers, num_kv_heads)](
        q, k, v, batch.block_tables, batch.context_lens, part_acc, part_ml,
        num_seqs, scale * _LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        batch.block_tables.stride(0),
        SEQS=seqs, PAGE=page, GROUP=group, ROWS=rows, D=head_dim, D_PAD=d_pad, BLOCK_N=block_n,
        PRECISION=precision, num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge_kernel[(num_seqs, num_kv_heads)](
        out, part_acc, part_ml, batch.context_lens, num_seqs, workers, out.stride(0), out.stride(1),
        SEQS=seqs, GROUP=group, ROWS=rows, D=head_dim, D_PAD=d_pad, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


def _prefill(q: Tensor, k: Tensor, v: Tensor, batch: BatchMetadata, scale: float) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = batch.num_seqs
    page, num_kv_heads = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    group_pad = triton.next_power_of_2(group)
    d_pad = max(16, triton.next_power_of_2(head_dim))
    wide = q.dtype == torch.float32 or d_pad > 128
    block_n, block_m = (32, 64) if wide else (64, 128)
    block_q = max(1, block_m // group_pad)
    out = torch.empty_like(q)
    # An upper bound that needs no copy from the device; the surplus programs return at once.
    max_tiles = num_tokens // block_q + num_seqs
    _prefill_kernel[(max_tiles, num_kv_heads)](
        q, k, v, out, batch.block_tables, batch.query_starts, batch.context_lens,
        num_seqs, scale * _LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        batch.block_tables.stride(0), out.stride(0), out.stride(1),
        SEQS=triton.next_power_of_2(max(num_seqs, _MIN_SEQS)), PAGE=page, GROUP=group,
        GROUP_PAD=group_pad, BLOCK_Q=block_q, D=head_dim, D_PAD=d_pad, BLOCK_N=block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4 if wide else 8, num_stages=2 if wide else 3,
    )  # fmt: skip
    return out


def paged_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float
) -> Tensor:
    """Causal attention of a varlen batch over paged KV.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim] views with equal strides
            and a contiguous last axis; the step's own K and V are already written.
        batch: lengths and block tables; a sequence with ``context_lens`` 0 gets zeros.
        scale: factor on the scores, usually ``head_dim ** -0.5``.

    Returns:
        [num_tokens, num_heads, head_dim] in ``q``'s type.
    """
    if k_cache.stride() != v_cache.stride():
        raise ValueError(
            f"k_cache and v_cache must have equal strides, got {k_cache.stride()} and "
            f"{v_cache.stride()}: take both from one paged cache."
        )
    step = _decode if batch.decode_only else _prefill
    return step(q, k_cache, v_cache, batch, scale)
