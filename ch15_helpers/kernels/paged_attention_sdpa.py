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
from ch15_helpers.kernels.kv_quant import decode

# A prompt is attended in blocks of this many queries, each with the keys up to its own end: torch's
# CPU kernel handles a short square faster than a long triangle (512 tokens: 3.2 ms against 4.2),
# and one small mask serves all blocks. Above 1024 tokens its own causal mode wins.
QUERY_BLOCK = 128
MAX_BLOCKED_PROMPT = 1024
# A gather of more tokens than this no longer fits the last-level cache, so it would be written
# to memory and read back: split the group instead.
MAX_GATHERED_TOKENS = 16384


@dataclass(frozen=True)
class _DecodeGroup:
    """Sequences with one query each, padded to a common context length.

    ``q_rows`` are their rows in the flat batch (None: all rows, in order), ``rows`` int64
    [num_seqs * context_len] the cache rows to gather, ``mask`` [num_seqs, 1, 1, context_len]
    what is added to the scores (None: no padding).
    """

    q_rows: Tensor | None
    rows: Tensor
    mask: Tensor | None
    num_seqs: int


@dataclass(frozen=True)
class _Chunk:
    """One sequence's prefill chunk: rows ``start`` to ``stop`` of the flat batch.

    ``mask`` [QUERY_BLOCK, context_len] is what is added to the scores of the last block; earlier
    blocks use its right-hand columns. None: one call, in the kernel's own causal mode.
    """

    start: int
    stop: int
    rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the layer: computed in the first, reused by the others."""

    decodes: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]


@dataclass(frozen=True)
class _Pages:
    """How a position becomes a row of the gather: ``table[pos // size] * stride + pos % size``."""

    block_size: int
    block_stride: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Cache:
    """Keys or values of one layer: pages, scales where they are quantised, and the row stride."""

    pages: Tensor
    scale: Tensor | None
    rows_per_block: int

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_rows, num_kv_heads, head_dim] in ``dtype``, decoded where quantised."""
        if self.scale is None:
            return _gather(self.pages, rows, self.rows_per_block).to(dtype)
        stored = _gather(self.pages.view(torch.uint8), rows, self.rows_per_block)
        blocks = rows // (self.rows_per_block or self.pages.shape[1])
        scale = self.scale.index_select(0, blocks)
        return decode(stored, self.pages.dtype).mul_(scale[:, :, None]).to(dtype)


def paged_attention_sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`ch15_helpers.kernels.paged_attention.paged_attention`.

    A batch without host lengths must be decode-only; then nothing here waits for the device.
    """
    block_size = k_cache.shape[1]
    rows_per_block = _rows_per_block(k_cache, v_cache)
    kv = _Cache(k_cache, k_scale, rows_per_block), _Cache(v_cache, v_scale, rows_per_block)
    key = ("sdpa", block_size, rows_per_block, q.dtype)
    plan = batch.scratch.get(key)
    if plan is None:
        pages = _Pages(block_size, rows_per_block or block_size, q.dtype)
        plan = batch.scratch[key] = _make_plan(batch, pages)
    if not plan.chunks and len(plan.decodes) == 1 and plan.decodes[0].q_rows is None:
        return _decode(q, kv, plan.decodes[0], scale)
    out = torch.zeros_like(q)
    for group in plan.decodes:
        rows = group.q_rows
        assert rows is not None
        queries = q.index_select(0, rows)
        out[rows] = _decode(queries, kv, group, scale)
    for chunk in plan.chunks:
        queries = q[chunk.start : chunk.stop]
        out[chunk.start : chunk.stop] = _prefill(queries, kv, chunk, scale)
    return out


def _decode(q: Tensor, kv: tuple[_Cache, _Cache], group: _DecodeGroup, scale: float) -> Tensor:
    kv_heads, head_dim = kv[0].pages.shape[2:]
    # The heads of one group read the same keys: they become the query dimension of one call.
    queries = q.reshape(group.num_seqs, kv_heads, -1, head_dim)
    keys, values = (cache.gather(group.rows, q.dtype) for cache in kv)
    shape = (group.num_seqs, -1, kv_heads, head_dim)
    out = scaled_dot_product_attention(
        queries,
        keys.view(shape).transpose(1, 2),
        values.view(shape).transpose(1, 2),
        attn_mask=group.mask,
        scale=scale,
    )
    return out.reshape(group.num_seqs, -1, head_dim)


def _prefill(q: Tensor, kv: tuple[_Cache, _Cache], chunk: _Chunk, scale: float) -> Tensor:
    kv_heads, head_dim = kv[0].pages.shape[2:]
    group = q.shape[1] // kv_heads
    # KV heads are the batch dimension and the heads that share one its heads: no key is repeated.
    queries = q.view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    gathered = (cache.gather(chunk.rows, q.dtype) for cache in kv)
    keys, values = (rows.transpose(0, 1).unsqueeze(1) for rows in gathered)
    query_len, context_len = q.shape[0], chunk.rows.shape[0]
    block = query_len if chunk.mask is None else QUERY_BLOCK
    out = torch.empty_like(q)
    for first in range(0, query_len, block):
        last = min(first + block, query_len)
        seen = context_len - query_len + last
        mask = chunk.mask
        if mask is not None:
            mask = mask[first + block - last :, context_len - seen :]
        mixed = scaled_dot_product_attention(
            queries[:, :, first:last],
            keys[:, :, :seen].expand(kv_heads, group, seen, head_dim),
            values[:, :, :seen].expand(kv_heads, group, seen, head_dim),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        out[first:last] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _rows_per_block(k_cache: Tensor, v_cache: Tensor) -> int:
    """Rows from one block to the next, where each slot is a row of one matrix; else 0.

    The row length is the stride between slots. A gather of such rows is one memcpy each, four
    times as fast here as indexing by block and offset; both layouts of the cache allow it.
    """
    block_stride, slot_stride, head_stride, stride = k_cache.stride()
    packed = stride == 1 and head_stride == k_cache.shape[3] and block_stride % slot_stride == 0
    return block_stride // slot_stride if packed and v_cache.stride() == k_cache.stride() else 0


def _gather(cache: Tensor, rows: Tensor, rows_per_block: int) -> Tensor:
    """[num_rows, num_kv_heads, head_dim]: the cache's content at rows, or slots without rows."""
    num_blocks, block_size, kv_heads, head_dim = cache.shape
    if rows_per_block == 0:
        return cache[rows // block_size, rows % block_size]
    matrix = cache.as_strided(
        ((num_blocks - 1) * rows_per_block + block_size, kv_heads * head_dim),
        (cache.stride(1), 1),
        cache.storage_offset(),
    )
    return matrix.index_select(0, rows).view(-1, kv_heads, head_dim)


def _make_plan(batch: BatchMetadata, pages: _Pages) -> _Plan:
    if batch.decode_only and not batch.context_lens_host:
        group = _group(batch, pages, None, batch.max_context_len)
        return _Plan((group,), ())
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
            pages,
            None if all_rows else [(s, starts[s]) for s in seqs],
            max(context_lens[s] for s in seqs),
            padded=len({context_lens[s] for s in seqs}) > 1,
        )
        for seqs in buckets
    )
    chunks = tuple(
        _chunk(batch, pages, s, (starts[s], starts[s + 1]), context_lens[s])
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
    pages: _Pages,
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
        mask = torch.zeros(len(lens), 1, 1, longest, dtype=pages.dtype, device=device)
        mask.masked_fill_((positions >= lens[:, None]).view(mask.shape), float("-inf"))
        positions = torch.minimum(positions, (lens[:, None] - 1).clamp(min=0))
    else:
        positions = positions.expand(len(lens), longest)
    blocks = tables.long().gather(1, positions.long() // pages.block_size)
    rows = blocks * pages.block_stride + positions % pages.block_size
    return _DecodeGroup(q_rows, rows.flatten(), mask, len(lens))


def _chunk(
    batch: BatchMetadata,
    pages: _Pages,
    seq: int,
    span: tuple[int, int],
    context_len: int,
) -> _Chunk:
    device = batch.block_tables.device
    positions = torch.arange(context_len, device=device)
    blocks = batch.block_tables[seq].long().index_select(0, positions // pages.block_size)
    rows = blocks * pages.block_stride + positions % pages.block_size
    query_len = span[1] - span[0]
    whole = query_len == context_len
    if whole and (query_len <= QUERY_BLOCK or query_len > MAX_BLOCKED_PROMPT):
        return _Chunk(*span, rows, None)
    ends = torch.arange(context_len - QUERY_BLOCK, context_len, device=device)
    mask = torch.zeros(QUERY_BLOCK, context_len, dtype=pages.dtype, device=device)
    mask.masked_fill_(positions > ends[:, None], float("-inf"))
    return _Chunk(*span, rows, mask)
