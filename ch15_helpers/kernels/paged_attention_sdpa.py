"""Paged attention by gathering pages and calling torch's fused attention (the CPU default).

Decoding sequences of similar length are gathered together and padded, because at one query per
sequence the cost is in the number of calls; prefill chunks go one at a time, unpadded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ch15_helpers.kernels.batch import BatchMetadata

# A gather of more tokens than this no longer fits the last-level cache, so it would be written
# to memory and read back: split the group instead.
MAX_GATHERED_TOKENS = 16384


@dataclass(frozen=True)
class _DecodeGroup:
    """Sequences with one query each, padded to a common context length.

    ``q_rows`` are their rows in the flat batch (None: all rows, in order), ``slots`` int64
    [num_seqs * context_len] the cache slots to gather, ``mask`` [num_seqs, 1, 1, context_len]
    what is added to the scores (None: no padding).
    """

    q_rows: Tensor | None
    slots: Tensor
    mask: Tensor | None
    num_seqs: int


@dataclass(frozen=True)
class _Chunk:
    """One sequence's prefill chunk: rows ``start`` to ``stop`` of the flat batch."""

    start: int
    stop: int
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the layer: computed in the first, reused by the others."""

    decodes: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]


def paged_attention_sdpa(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float
) -> Tensor:
    """See :func:`ch15_helpers.kernels.paged_attention.paged_attention`.

    A batch without host lengths must be decode-only; then nothing here waits for the device.
    """
    block_size = k_cache.shape[1]
    key = ("sdpa", block_size, q.dtype)
    plan = batch.scratch.get(key)
    if plan is None:
        plan = batch.scratch[key] = _make_plan(batch, block_size, q.dtype)
    if not plan.chunks and len(plan.decodes) == 1 and plan.decodes[0].q_rows is None:
        return _decode(q, k_cache, v_cache, plan.decodes[0], scale)
    out = torch.zeros_like(q)
    for group in plan.decodes:
        rows = group.q_rows
        assert rows is not None
        out[rows] = _decode(q.index_select(0, rows), k_cache, v_cache, group, scale)
    for chunk in plan.chunks:
        queries = q[chunk.start : chunk.stop]
        out[chunk.start : chunk.stop] = _prefill(queries, k_cache, v_cache, chunk, scale)
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _DecodeGroup, scale: float
) -> Tensor:
    kv_heads, head_dim = k_cache.shape[2], k_cache.shape[3]
    # The heads of one group read the same keys: they become the query dimension of one call.
    queries = q.reshape(group.num_seqs, kv_heads, -1, head_dim)
    keys = _gather(k_cache, group.slots, q.dtype)
    values = _gather(v_cache, group.slots, q.dtype)
    shape = (group.num_seqs, -1, kv_heads, head_dim)
    out = scaled_dot_product_attention(
        queries,
        keys.view(shape).transpose(1, 2),
        values.view(shape).transpose(1, 2),
        attn_mask=group.mask,
        scale=scale,
    )
    return out.reshape(group.num_seqs, -1, head_dim)


def _prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: _Chunk, scale: float) -> Tensor:
    kv_heads, head_dim = k_cache.shape[2], k_cache.shape[3]
    group = q.shape[1] // kv_heads
    context_len = chunk.slots.shape[0]
    keys = _gather(k_cache, chunk.slots, q.dtype).transpose(0, 1).unsqueeze(1)
    values = _gather(v_cache, chunk.slots, q.dtype).transpose(0, 1).unsqueeze(1)
    out = scaled_dot_product_attention(
        q.view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3),
        keys.expand(kv_heads, group, context_len, head_dim),
        values.expand(kv_heads, group, context_len, head_dim),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None and q.shape[0] > 1,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(q.shape)


def _gather(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[num_slots, num_kv_heads, head_dim]: the cache's content at flat slots."""
    block_size, kv_heads, head_dim = cache.shape[1:]
    block_stride, slot_stride = cache.stride(0), cache.stride(1)
    packed = cache.stride(3) == 1 and cache.stride(2) == head_dim
    if not packed or block_stride % slot_stride:
        return cache[slots // block_size, slots % block_size].to(dtype)
    # Every slot is a row of one matrix whose row length is the slot stride: a gather of rows is
    # one memcpy each, four times as fast here as indexing by block and offset.
    rows_per_block = block_stride // slot_stride
    rows = slots
    if rows_per_block != block_size:
        rows = slots + slots.div(block_size, rounding_mode="floor") * (rows_per_block - block_size)
    matrix = cache.as_strided(
        ((cache.shape[0] - 1) * rows_per_block + block_size, kv_heads * head_dim),
        (slot_stride, 1),
        cache.storage_offset(),
    )
    return matrix.index_select(0, rows).view(-1, kv_heads, head_dim).to(dtype)


def _make_plan(batch: BatchMetadata, block_size: int, dtype: torch.dtype) -> _Plan:
    if batch.decode_only and not batch.context_lens_host:
        return _Plan((_group(batch, block_size, dtype, None, batch.max_context_len),), ())
    query_lens = batch.query_lens_host or tuple(batch.query_starts.diff().tolist())
    context_lens = batch.context_lens_host or tuple(batch.context_lens.tolist())
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)
    decoding = [s for s, n in enumerate(query_lens) if n == 1 and context_lens[s] > 0]
    buckets = _buckets(decoding, context_lens)
    all_rows = len(buckets) == 1 and len(decoding) == batch.num_seqs == starts[-1]
    decodes = tuple(
        _group(
            batch,
            block_size,
            dtype,
            None if all_rows else [(s, starts[s]) for s in seqs],
            max(context_lens[s] for s in seqs),
            padded=len({context_lens[s] for s in seqs}) > 1,
        )
        for seqs in buckets
    )
    chunks = tuple(
        _chunk(batch, block_size, dtype, s, (starts[s], starts[s + 1]), context_lens[s])
        for s, n in enumerate(query_lens)
        if n > 1
    )
    return _Plan(decodes, chunks)


def _buckets(seqs: list[int], context_lens: tuple[int, ...]) -> list[list[int]]:
    """Groups sequences so that padding at most doubles the work and a gather stays bounded."""
    if not seqs:
        return []
    longest = max(context_lens[s] for s in seqs)
    shortest = min(context_lens[s] for s in seqs)
    if longest <= 2 * shortest and longest * len(seqs) <= MAX_GATHERED_TOKENS:
        return [seqs]
    buckets: list[list[int]] = []
    floor = 0
    for seq in sorted(seqs, key=lambda s: -context_lens[s]):
        length = context_lens[seq]
        top = context_lens[buckets[-1][0]] if buckets else 0
        if not buckets or length < floor or top * (len(buckets[-1]) + 1) > MAX_GATHERED_TOKENS:
            buckets.append([])
            # Below about 64 tokens a call costs more than the padding that it saves.
            floor = length // 2 if length > 64 else 0
        buckets[-1].append(seq)
    return buckets


def _group(
    batch: BatchMetadata,
    block_size: int,
    dtype: torch.dtype,
    members: list[tuple[int, int]] | None,
    longest: int,
    padded: bool = True,
) -> _DecodeGroup:
    device = batch.block_tables.device
    tables, lens, q_rows = batch.block_tables, batch.context_lens, None
    if members is not None:
        seqs = torch.tensor([s for s, _ in members], device=device)
        q_rows = torch.tensor([row for _, row in members], device=device)
        tables, lens = tables.index_select(0, seqs), lens.index_select(0, seqs)
    positions = torch.arange(longest, device=device)
    mask = None
    if padded:
        # Padding repeats the sequence's last token: stale or uninitialised slots are never read.
        mask = torch.zeros(len(lens), 1, 1, longest, dtype=dtype, device=device)
        mask.masked_fill_((positions >= lens[:, None]).view(mask.shape), float("-inf"))
        positions = torch.minimum(positions, (lens[:, None] - 1).clamp(min=0))
    else:
        positions = positions.expand(len(lens), longest)
    blocks = tables.long().gather(1, positions.long() // block_size)
    slots = blocks * block_size + positions % block_size
    return _DecodeGroup(q_rows, slots.flatten(), mask, len(lens))


def _chunk(
    batch: BatchMetadata,
    block_size: int,
    dtype: torch.dtype,
    seq: int,
    rows: tuple[int, int],
    context_len: int,
) -> _Chunk:
    device = batch.block_tables.device
    positions = torch.arange(context_len, device=device)
    blocks = batch.block_tables[seq].long().index_select(0, positions // block_size)
    slots = blocks * block_size + positions % block_size
    query_len = rows[1] - rows[0]
    mask = None
    if query_len < context_len:
        query_positions = positions[context_len - query_len :, None]
        mask = torch.zeros(query_len, context_len, dtype=dtype, device=device)
        mask.masked_fill_(positions > query_positions, float("-inf"))
    return _Chunk(*rows, slots, mask)
