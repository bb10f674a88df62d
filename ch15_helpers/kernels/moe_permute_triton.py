# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sorting (token, choice) pairs by expert on the device, and moving rows to and from that order.

The host never learns how many pairs an expert has: a counting sort writes a list of tiles, and the
kernels that follow are launched for the most tiles that there can be. Up to ``_ONE_LAUNCH_PAIRS``
pairs it is one launch, in which every program counts all pairs for itself; more are counted once,
by chunks, at most ``_MAX_CHUNKS`` of them, so that the counts never grow with tokens times experts.
The sort is stable and its layout does not depend on which program comes first: equal inputs always
give equal layouts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from ch15_helpers.kernels.dispatch import launches_early
from ch15_helpers.kernels.moe_permute import ExpertOrder
from ch15_helpers.kernels.replay_triton import recordable

_MAX_CHUNKS = 1024
_BLOCK, _WARPS = 128, 4  # pairs ranked at once
_SCAN_EXPERTS = 4  # of one program
_COUNT_BLOCK = 2048  # pairs counted at once
_ONE_LAUNCH_PAIRS = 8192  # as many pairs at most are counted by every program for itself
_VARYING = ("num_pairs", "chunk", "num_chunks", "num_tokens")


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


@recordable
@triton.jit(do_not_specialize=_VARYING)
def _count_kernel(ids_ptr, counts_ptr, num_pairs, chunk,
                  E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr,
                  EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    begin = tl.program_id(0) * chunk
    stop = tl.minimum(begin + chunk, num_pairs)
    counts = _count(ids_ptr, begin, stop, E, E_PAD, BLOCK)
    tl.store(counts_ptr + tl.program_id(0) * E_PAD + tl.arange(0, E_PAD), counts)


@recordable
@triton.jit(do_not_specialize=_VARYING)
def _scan_kernel(counts_ptr, num_chunks,
                 E_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr, BLOCK: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """Counts of each chunk to counts before it, in place; a last row for all chunks."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    chunks = tl.arange(0, CHUNKS_PAD)
    experts = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    table_ptr = counts_ptr + chunks[:, None] * E_PAD + experts[None, :]
    here = (chunks < num_chunks)[:, None]
    counts = tl.load(table_ptr, mask=here, other=0)
    tl.store(table_ptr, tl.cumsum(counts, 0) - counts, mask=here)
    tl.store(counts_ptr + num_chunks * E_PAD + experts, tl.sum(counts, 0))


@recordable
@triton.jit(do_not_specialize=_VARYING)
def _place_kernel(
    ids_ptr, counts_ptr, rows_ptr, positions_ptr, tiles_ptr, counters_ptr, num_pairs, chunk,
    E: tl.constexpr, E_PAD: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, COUNT_BLOCK: tl.constexpr, COUNTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    me = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    begin = me * chunk
    stop = tl.minimum(begin + chunk, num_pairs)
    if COUNTED:
        before = tl.load(counts_ptr + me * E_PAD + experts)
        counts = tl.load(counts_ptr + tl.num_programs(0) * E_PAD + experts)
    else:
        before = _count(ids_ptr, 0, begin, E, E_PAD, COUNT_BLOCK)
        counts = before + _count(ids_ptr, begin, num_pairs, E, E_PAD, COUNT_BLOCK)
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
    for i in range(me, ALIGN - 1, tl.num_programs(0)):
        slot = starts + counts + i
        tl.store(rows_ptr + slot, num_pairs, mask=slot < starts + padded)
    # Chunk by chunk, so that one expert with every token does not keep a single program busy.
    for i in range(me, tl.max(tiles), tl.num_programs(0)):
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
        expert = tl.load(ids_ptr + first + lane, mask=first + lane < stop, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert < E)
        count = tl.histogram(tl.where(here, expert, 0), E_PAD, mask=here)
        # Sorted with their lanes, so that equal experts keep their order.
        key = tl.sort(tl.where(here, expert, E_PAD) * BLOCK + lane)
        expert, pair = key // BLOCK, first + key % BLOCK
        here = expert < E_PAD
        shift = slots + count - tl.cumsum(count, 0)
        slot = tl.gather(shift, tl.where(here, expert, 0), 0) + lane
        slots += count
        tl.store(rows_ptr + slot, pair, mask=here)
        tl.store(positions_ptr + pair, tl.where(here, slot, -1), mask=pair < stop)


@recordable
@triton.jit(do_not_specialize=_VARYING)
def _gather_kernel(x_ptr, out_ptr, positions_ptr, stride_x, hidden,
                   TOP_K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < hidden
        values = tl.load(x_ptr + token * stride_x + column, mask=mask)
        for j in tl.static_range(TOP_K):
            row = tl.load(positions_ptr + token * TOP_K + j).to(tl.int64)
            tl.store(out_ptr + row * hidden + column, values, mask=mask & (row >= 0))


@recordable
@triton.jit(do_not_specialize=_VARYING)
def _combine_kernel(y_ptr, out_ptr, positions_ptr, weights_ptr, hidden,
                    TOP_K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
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


def early(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it ends, and waits for it."""
    if launches_early(tensor.device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def sort_by_expert_triton(
    experts: Tensor, num_experts: int, align: int, tile: int, capacity: int, max_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ch15_helpers.kernels.moe_permute.sort_by_expert`: its fields."""
    num_pairs = experts.numel()
    new = experts.new_empty
    rows, positions = new(capacity, dtype=torch.int32), new(num_pairs, dtype=torch.int32)
    tiles, counters = new((max_tiles, 4), dtype=torch.int32), new(3, dtype=torch.int32)
    chunk = triton.cdiv(num_pairs, _MAX_CHUNKS * _BLOCK) * _BLOCK
    chunks = triton.cdiv(num_pairs, chunk)
    e_pad = max(16, triton.next_power_of_2(num_experts))
    counts = new((chunks + 1, e_pad), dtype=torch.int32)
    options = {"num_warps": _WARPS, **early(experts)}
    shape = {"E": num_experts, "E_PAD": e_pad, "BLOCK": _BLOCK, **options}
    counted = num_pairs > _ONE_LAUNCH_PAIRS
    if counted:
        _count_kernel[(chunks,)](experts, counts, num_pairs, chunk, **shape)
        _scan_kernel[(e_pad // _SCAN_EXPERTS,)](
            counts, chunks, e_pad, triton.next_power_of_2(chunks), _SCAN_EXPERTS, **options
        )
    _place_kernel[(chunks,)](
        experts, counts, rows, positions, tiles, counters, num_pairs, chunk, ALIGN=align, TILE=tile,
        COUNT_BLOCK=_COUNT_BLOCK, COUNTED=counted, **shape,
    )  # fmt: skip
    return rows, positions, tiles, counters


def gather_rows_triton(x: Tensor, order: ExpertOrder, top_k: int) -> Tensor:
    """Copies each token's row to the positions of its pairs: [capacity, hidden].

    Rows of padding stay unwritten: what is computed from them is never read.
    """
    num_tokens, hidden = x.shape
    out = x.new_empty((order.capacity, hidden))
    block = min(4096, triton.next_power_of_2(hidden))
    _gather_kernel[(num_tokens,)](
        x, out, order.positions, x.stride(0), hidden, top_k, block, **early(x)
    )
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
    _combine_kernel[grid](y, out, positions, weights, hidden, top_k, block, **early(y))
    return out
