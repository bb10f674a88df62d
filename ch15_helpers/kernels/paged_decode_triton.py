# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton reads the kernels' signatures itself: constexpr, pointers and strides have no Python types.
"""Paged attention of short queries in one launch: decodes, and the few tokens of a verification.

The work is bound by the bytes of K and V. The tiles of ``BLOCK_N`` tokens of all sequences are
dealt out in equal runs to as many programs as the chip holds (stream-K, Osama et al. 2023,
applied to split-KV decoding, FlashDecoding, Dao et al. 2023), so that skewed context lengths cost
no more than even ones. A run that covers only a part of a sequence leaves a partial softmax, and
whoever finishes a sequence's last run merges them. Nothing depends on a length that the host
knows, so the launch can be captured in a CUDA graph.

Bytes: ``2 * sum(context_lens) * num_kv_heads * head_dim * element_size``.
Operations: ``4 * num_heads * head_dim`` for each (query, visible key) pair.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    merge_parts,
)
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.dispatch import num_processors
from ch15_helpers.kernels.quantised_tile_triton import run_quantised

MAX_ROWS = 64


@triton.jit
def _run(q_rows_ptr, row_ok, k_ptr, v_ptr, table_ptr, first, last, context, position, scale_log2,
         stride_block, stride_token, PAGE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
         D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Softmax state of some rows over the keys ``first`` to ``last`` of one sequence."""
    d = tl.arange(0, D_PAD)
    q_mask = row_ok[:, None] & (d < D)[None, :]
    q = tl.load(q_rows_ptr[:, None] + d[None, :], mask=q_mask, other=0.0)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    denom = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    tokens = first + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + tokens // PAGE, mask=tokens < context, other=0)
    for _ in range(first, last, BLOCK_N):
        # The next tile's pages are looked up one tile ahead: their rows can then be fetched
        # without waiting for the table.
        following = tokens + BLOCK_N
        next_blocks = tl.load(table_ptr + following // PAGE, mask=following < context, other=0)
        ok = tokens < context
        k = load_tile(k_ptr, blocks, tokens, ok, stride_block, stride_token, q.dtype,
                      PAGE, D, D_PAD)  # fmt: skip
        v = load_tile(v_ptr, blocks, tokens, ok, stride_block, stride_token, q.dtype,
                      PAGE, D, D_PAD)  # fmt: skip
        visible = tokens[None, :] <= position[:, None]
        m, denom, acc = attend(q, k, v, visible, scale_log2, 1.0, m, denom, acc, PRECISION)
        tokens = following
        blocks = next_blocks
    return m, denom, acc


@triton.jit
def _state(q_rows_ptr, row_ok, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first, last,
           context, position, scale_log2, stride_block, stride_token, stride_scale,
           SCALED: tl.constexpr, COMPUTE: tl.constexpr, FP8: tl.constexpr, PAGE: tl.constexpr,
           ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    if SCALED:
        m, denom, acc = run_quantised(
            q_rows_ptr, row_ok, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first, last,
            context, position, scale_log2, stride_block, stride_token, stride_scale, COMPUTE, FP8,
            PAGE, ROWS, D, D_PAD, BLOCK_N, PRECISION)  # fmt: skip
    else:
        m, denom, acc = _run(
            q_rows_ptr, row_ok, k_ptr, v_ptr, table_ptr, first, last, context, position, scale_log2,
            stride_block, stride_token, PAGE, ROWS, D, D_PAD, BLOCK_N, PRECISION)  # fmt: skip
    return m, denom, acc


@triton.jit
def _schedule(context_ptr, num_seqs, num_units, SEQS: tl.constexpr, BLOCK_N: tl.constexpr,
              LEAD: tl.constexpr):  # fmt: skip
    """Where each sequence's tiles end, and with how many each one's count is padded."""
    s = tl.arange(0, SEQS)
    tiles = tl.cdiv(tl.load(context_ptr + s, mask=s < num_seqs, other=0), BLOCK_N)
    # Beginning a sequence takes about as long as some tiles: it counts as so many.
    lead = tl.minimum(LEAD, tl.sum(tiles) // (4 * num_units))
    return tl.cumsum(tl.where(tiles > 0, tiles + lead, 0), 0), lead


@triton.jit
def _leave_part(part_acc_ptr, part_ml_ptr, arrived_ptr, part, first_part, num_parts, stride_part,
                m, denom, acc, row_ok, ROWS: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """Leaves a partial softmax behind. Whoever brings the last one gets True and the whole."""
    rows = part * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    tl.store(part_acc_ptr + rows[:, None] * D_PAD + d[None, :], acc, mask=row_ok[:, None])
    tl.store(part_ml_ptr + rows * 2, m)
    tl.store(part_ml_ptr + rows * 2 + 1, denom)
    tl.debug_barrier()
    finished = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_parts - 1
    if finished:
        # Back to zero for the next launch.
        tl.store(arrived_ptr, 0)
        denom, acc = merge_parts(part_acc_ptr, part_ml_ptr, first_part * ROWS, num_parts,
                                 stride_part * ROWS, row_ok, ROWS, D_PAD)  # fmt: skip
    return finished, denom, acc


@triton.jit
def _zero_idle_rows(out_ptr, starts_ptr, context_ptr, first_seq, step, num_seqs, token, offset,
                    stride_out_token, D: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """Sequences without context, such as padding, get zeros."""
    d = tl.arange(0, D_PAD)
    for seq in range(first_seq, num_seqs, step):
        if tl.load(context_ptr + seq) == 0:
            begin, end = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
            mask = (begin + token < end)[:, None] & (d < D)[None, :]
            to = (begin + token) * stride_out_token + offset
            tl.store(out_ptr + to[:, None] + d[None, :], 0.0, mask=mask)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=METADATA)
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, context_ptr,
    part_acc_ptr, part_ml_ptr, arrivals_ptr,
    num_seqs, num_units, num_kv_heads, scale_log2, stride_q_token, stride_q_head,
    stride_block, stride_token, stride_kv_head, stride_scale, stride_scale_head, stride_table,
    stride_out_token, stride_out_head,
    SEQS: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, FP8: tl.constexpr, COMPUTE: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ends, lead = _schedule(context_ptr, num_seqs, num_units, SEQS, BLOCK_N, LEAD)
    total = tl.max(ends)
    # With fewer tiles than runs each run gets one tile, so that no partial stays unwritten.
    units = tl.minimum(num_units, total)
    rows, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    token, member = rows // GROUP, rows % GROUP
    unit, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    offset = (kv_head * GROUP + member) * stride_out_head
    tile = ((unit.to(tl.int64) * total) // units).to(tl.int32)
    last = (((unit + 1).to(tl.int64) * total) // units).to(tl.int32)
    last = tl.where(unit < units, last, tile)
    seq = tl.sum((ends <= tile).to(tl.int32))
    while tile < last:
        context = tl.load(context_ptr + seq)
        seq_end = tl.sum(tl.where(tl.arange(0, SEQS) == seq, ends, 0))
        seq_start = seq_end - tl.cdiv(context, BLOCK_N) - lead
        stop = tl.minimum(last, seq_end)
        q_begin = tl.load(starts_ptr + seq)
        q_len = tl.load(starts_ptr + seq + 1) - q_begin
        row_ok = token < q_len
        q_rows = q_ptr + (q_begin + token) * stride_q_token + (
            kv_head * GROUP + member) * stride_q_head  # fmt: skip
        position = tl.minimum(context - q_len + token, context - 1)
        m, denom, acc = _state(
            q_rows, row_ok, k_ptr + kv_head * stride_kv_head, v_ptr + kv_head * stride_kv_head,
            k_scale_ptr + kv_head * stride_scale_head, v_scale_ptr + kv_head * stride_scale_head,
            table_ptr + seq.to(tl.int64) * stride_table,
            tl.maximum(tile - seq_start - lead, 0) * BLOCK_N, (stop - seq_start - lead) * BLOCK_N,
            context, position, scale_log2, stride_block, stride_token, stride_scale,
            SCALED, COMPUTE, FP8, PAGE, ROWS, D, D_PAD, BLOCK_N, PRECISION)  # fmt: skip
        # Runs that hold a part of this sequence: run u begins at tile u * total // units.
        first_unit = (((seq_start + 1).to(tl.int64) * units - 1) // total).to(tl.int32)
        last_unit = ((seq_end.to(tl.int64) * units - 1) // total).to(tl.int32)
        num_parts = last_unit - first_unit + 1
        finished = num_parts == 1
        if num_parts > 1:
            # (unit, seq) only ever grows in one coordinate or both: the sum numbers the parts.
            finished, denom, acc = _leave_part(
                part_acc_ptr, part_ml_ptr, arrivals_ptr + seq * num_kv_heads + kv_head,
                (unit + seq) * num_kv_heads + kv_head, (first_unit + seq) * num_kv_heads + kv_head,
                num_parts, num_kv_heads, m, denom, acc, row_ok, ROWS, D_PAD)  # fmt: skip
        if finished:
            out = (acc / tl.where(denom > 0.0, denom, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
            to = (q_begin + token) * stride_out_token + offset
            mask = row_ok[:, None] & (d < D)[None, :]
            tl.store(out_ptr + to[:, None] + d[None, :], out, mask=mask)
        tile = stop
        seq += 1
    _zero_idle_rows(out_ptr, starts_ptr, context_ptr, unit, tl.num_programs(0) // num_kv_heads,
                    num_seqs, token, offset, stride_out_token, D, D_PAD)  # fmt: skip


@dataclass(frozen=True)
class DecodeShape:
    """Launch parameters: keys in a tile, warps, pipeline stages, programs a processor holds.

    ``lead`` is the cost of beginning a sequence, in tiles.
    """

    block_n: int
    num_warps: int
    num_stages: int
    per_processor: int
    lead: int = 2


def decode_shape(q_dtype: torch.dtype, kv_dtype: torch.dtype, d_pad: int) -> DecodeShape:
    """What ran fastest on an H200 over batch sizes, context lengths and page sizes."""
    if kv_dtype.itemsize == 1 and d_pad <= 128 and q_dtype == torch.bfloat16:
        return DecodeShape(128, 4, 3, 2)
    if q_dtype == torch.float32 or d_pad > 128 or kv_dtype.itemsize == 1:
        return DecodeShape(32, 4, 3, 2)
    return DecodeShape(64, 2, 3, 4) if d_pad <= 64 else DecodeShape(64, 4, 3, 2)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    shape: DecodeShape | None = None,
) -> Tensor:
    """Attention of sequences with at most 64 (query, head of one KV head) rows each.

    Arguments and result as ``paged_attention_triton``; ``shape`` overrides the launch parameters.
    """
    num_heads, head_dim = q.shape[1:]
    page, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    rows = max(16, triton.next_power_of_2(group * batch.max_query_len))
    # One-byte pages are multiplied in halves, of 16 channels at the least.
    d_pad = max(16 if k_scale is None else 32, triton.next_power_of_2(head_dim))
    shape = shape or decode_shape(q.dtype, k_cache.dtype, d_pad)
    units = max(1, num_processors(q.device) * shape.per_processor // num_kv_heads)
    parts = (units + batch.num_seqs) * num_kv_heads * rows
    part_acc, part_ml, arrivals = _scratch(batch, parts, d_pad, num_kv_heads, q.device)
    out = torch.empty_like(q) if out is None else out
    tables = batch.block_tables
    _decode_kernel[(units * num_kv_heads,)](
        q, k_cache, v_cache, out, q if k_scale is None else k_scale,
        q if v_scale is None else v_scale, tables, batch.query_starts, batch.context_lens,
        part_acc, part_ml, arrivals,
        batch.num_seqs, units, num_kv_heads, scale * LOG2E, q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        *((0, 0) if k_scale is None else k_scale.stride()), tables.stride(0),
        out.stride(0), out.stride(1),
        SEQS=triton.next_power_of_2(max(batch.num_seqs, MIN_SEQS)), PAGE=page, GROUP=group,
        ROWS=rows, D=head_dim, D_PAD=d_pad, BLOCK_N=shape.block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", SCALED=k_scale is not None,
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        # float16 has too little range for the scales; TF32 has its digits and float32's range.
        COMPUTE=tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32, LEAD=shape.lead,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return out


def _scratch(
    batch: BatchMetadata, parts: int, d_pad: int, num_kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Partials, and counters of them that start at zero and that every launch leaves at zero.

    One step's layers run one after another, so they share them.
    """
    key = ("paged_decode", parts, d_pad)
    if key not in batch.scratch:
        batch.scratch[key] = (
            torch.empty((parts, d_pad), device=device, dtype=torch.float32),
            torch.empty((parts, 2), device=device, dtype=torch.float32),
            torch.zeros(batch.num_seqs * num_kv_heads, device=device, dtype=torch.int32),
        )
    scratch: tuple[Tensor, Tensor, Tensor] = batch.scratch[key]
    return scratch
