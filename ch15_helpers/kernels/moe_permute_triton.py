# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sorting (token, choice) pairs by expert on the device, and moving rows to and from that order.

The host never learns how many pairs an expert has: a counting sort in one or two launches writes
a list of tiles, and the kernels that follow are launched for the most tiles that there can be.
The sort is stable and uses no atomics, so equal inputs always give equal layouts. Tokens are cut
into at most ``_MAX_CHUNKS`` chunks, so that the counts never grow with tokens times experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ch15_helpers.kernels.moe_permute import ExpertOrder

_MAX_CHUNKS = 128
_BLOCK = 128  # pairs ranked at once
_VARYING = ("num_pairs", "chunk", "num_tokens")


@triton.jit
def _count(ids_ptr, begin, stop, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs of each expert among ids[begin:stop]; ids outside 0..E-1 count nowhere."""
    counts = tl.zeros([E_PAD], tl.int32)
    for first in range(begin, stop, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        expert = tl.load(ids_ptr + pair, mask=pair < stop, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert < E)
        counts += tl.histogram(tl.where(here, expert, 0), E_PAD, mask=here)
    return counts


@triton.jit(do_not_specialize=_VARYING)
def _count_kernel(ids_ptr, counts_ptr, num_pairs, chunk,
                  E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    begin = tl.program_id(0) * chunk
    stop = tl.minimum(begin + chunk, num_pairs)
    counts = _count(ids_ptr, begin, stop, E, E_PAD, BLOCK)
    tl.store(counts_ptr + tl.program_id(0) * E_PAD + tl.arange(0, E_PAD), counts)


@triton.jit(do_not_specialize=_VARYING)
def _place_kernel(
    ids_ptr, counts_ptr, rows_ptr, positions_ptr, tiles_ptr, counters_ptr, num_pairs, chunk,
    E: tl.constexpr, E_PAD: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    begin = me * chunk
    stop = tl.minimum(begin + chunk, num_pairs)
    if CHUNKS == 1:
        counts = _count(ids_ptr, begin, stop, E, E_PAD, BLOCK)
        before = tl.zeros([E_PAD], tl.int32)
    else:
        chunks = tl.arange(0, CHUNKS_PAD)
        offsets = chunks[:, None] * E_PAD + experts[None, :]
        table = tl.load(counts_ptr + offsets, mask=(chunks < CHUNKS)[:, None], other=0)
        counts = tl.sum(table, 0)
        before = tl.sum(tl.where((chunks < me)[:, None], table, 0), 0)
    padded = tl.cdiv(counts, ALIGN) * ALIGN
    starts = tl.cumsum(padded, 0) - padded
    tiles = tl.cdiv(counts, TILE)
    first_tile = tl.cumsum(tiles, 0) - tiles
    # The other order of tiles: those more than half full, then the others.
    tall = (counts + (TILE - TILE // 2 - 1)) // TILE
    first_tall = tl.cumsum(tall, 0) - tall
    first_short = tl.sum(tall) + tl.cumsum(tiles - tall, 0) - (tiles - tall)
    if me == 0:
        tl.store(counters_ptr, tl.sum(tiles))
        tl.store(counters_ptr + 1, 0)
        tl.store(counters_ptr + 2, 0)
        for i in range(ALIGN - 1):
            slot = starts + counts + i
            tl.store(rows_ptr + slot, num_pairs, mask=slot < starts + padded)
    # Chunk by chunk, so that one expert with every token does not keep a single program busy.
    for i in range(me, tl.max(tiles), CHUNKS):
        tile_ptr = tiles_ptr + (first_tile + i) * 4
        exists = i < tiles
        tl.store(tile_ptr, experts, mask=exists)
        tl.store(tile_ptr + 1, starts + i * TILE, mask=exists)
        tl.store(tile_ptr + 2, tl.minimum(counts - i * TILE, TILE), mask=exists)
        place = tl.where(i < tall, first_tall + i, first_short)
        tl.store(tiles_ptr + place * 4 + 3, first_tile + i, mask=exists)
    slots = starts + before
    lane = tl.arange(0, BLOCK)
    for first in range(begin, stop, BLOCK):
        pair = first + lane
        expert = tl.load(ids_ptr + pair, mask=pair < stop, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert < E)
        # Rank inside the block: how many lanes before this one have the same expert.
        same = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        safe = tl.where(here, expert, 0)
        slot = tl.gather(slots, safe, 0) + tl.sum(same.to(tl.int32), 1)
        slots += tl.histogram(safe, E_PAD, mask=here)
        tl.store(rows_ptr + slot, pair, mask=here)
        tl.store(positions_ptr + pair, tl.where(here, slot, -1), mask=pair < stop)


@triton.jit(do_not_specialize=_VARYING)
def _gather_kernel(x_ptr, out_ptr, positions_ptr, stride_x, hidden,
                   TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < hidden
        values = tl.load(x_ptr + token * stride_x + column, mask=mask)
        for j in tl.static_range(TOP_K):
            row = tl.load(positions_ptr + token * TOP_K + j).to(tl.int64)
            tl.store(out_ptr + row * hidden + column, values, mask=mask & (row >= 0))


@triton.jit(do_not_specialize=_VARYING)
def _combine_kernel(y_ptr, out_ptr, positions_ptr, weights_ptr, hidden,
                    TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(positions_ptr + token * TOP_K + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        y = tl.load(y_ptr + row * hidden + column, mask=mask & (row >= 0), other=0.0)
        total += tl.where(row >= 0, weight, 0.0) * y.to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def sort_by_expert_triton(
    experts: Tensor, num_experts: int, align: int, tile: int, capacity: int, max_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ch15_helpers.kernels.moe_permute.sort_by_expert`: its fields."""
    num_pairs = experts.numel()
    new = experts.new_empty
    rows, positions = new(capacity, dtype=torch.int32), new(num_pairs, dtype=torch.int32)
    tiles, counters = new((max_tiles, 4), dtype=torch.int32), new(3, dtype=torch.int32)
    # One program ranks 4 blocks in the time that a second launch and its table would take.
    chunks = 1 if num_pairs <= 4 * _BLOCK else min(_MAX_CHUNKS, num_pairs // _BLOCK)
    chunk = triton.cdiv(triton.cdiv(num_pairs, chunks), _BLOCK) * _BLOCK
    chunks = max(1, triton.cdiv(num_pairs, chunk))
    e_pad = max(16, triton.next_power_of_2(num_experts))
    counts = new((chunks, e_pad), dtype=torch.int32)
    shape = {"E": num_experts, "E_PAD": e_pad, "BLOCK": _BLOCK, "num_warps": 8}
    if chunks > 1:
        _count_kernel[(chunks,)](experts, counts, num_pairs, chunk, **shape)
    _place_kernel[(chunks,)](
        experts, counts, rows, positions, tiles, counters, num_pairs, chunk, CHUNKS=chunks,
        CHUNKS_PAD=triton.next_power_of_2(chunks), ALIGN=align, TILE=tile, **shape,
    )  # fmt: skip
    return rows, positions, tiles, counters


def gather_rows_triton(x: Tensor, order: ExpertOrder, top_k: int) -> Tensor:
    """Copies each token's row to the positions of its pairs: [capacity, hidden].

    Rows of padding stay unwritten: what is computed from them is never read.
    """
    num_tokens, hidden = x.shape
    out = x.new_empty((order.capacity, hidden))
    block = min(4096, triton.next_power_of_2(hidden))
    _gather_kernel[(num_tokens,)](x, out, order.positions, x.stride(0), hidden, top_k, block)
    return out


def combine_triton(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Sums each token's rows of ``y`` by their weights, in order of choice: [num_tokens, hidden].

    Args:
        y: [capacity, hidden], rows sorted by expert.
        positions: int32 [num_tokens * top_k], row of each pair, -1 where there is none.
        weights: float32 [num_tokens, top_k].
    """
    (num_tokens, top_k), hidden = weights.shape, y.shape[1]
    out = y.new_empty((num_tokens, hidden))
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (num_tokens, triton.cdiv(hidden, block))
    _combine_kernel[grid](y, out, positions, weights, hidden, top_k, block)
    return out
