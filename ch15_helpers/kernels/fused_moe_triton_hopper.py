# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: RUF005 - Gluon's lists know `+`, not unpacking.
"""Grouped matrix product for many rows per expert, on Hopper's tensor cores.

Plain Triton waits for a tile's epilogue before it loads the next tile. Here three groups of warps
work side by side (warp specialisation, CUTLASS; FlashAttention-3, Shah et al. 2024): one warp
only starts bulk copies (TMA) into a ring of buffers, also for the tile to come, and two groups of
four warps multiply, each its own 64 rows of a tile of 128 x 256. A group whose 64 rows are
padding skips its products, and the other has the tensor cores to itself, so that ragged experts
waste less than one in 64 rows. Written in Gluon, Triton's lower level, which alone can do this.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ch15_helpers.kernels.moe_permute import ExpertOrder

HALF = 64  # rows of one group of warps; experts start at multiples of it
TILE = 2 * HALF
_BLOCK_N, _BLOCK_K = 256, 64
_STAGES = 4
_GROUP_TILES = 16  # tiles that share a block of weights while it is in the cache
# Threads of 12 warps share 65536 registers: 168 each, of which the copying warps need 24.
_MAX_REGISTERS, _MULTIPLY_REGISTERS, _COPY_REGISTERS = 168, 240, 24


@gluon.jit
def _locate(item, num_tiles, columns, tiles_ptr, GROUP: gl.constexpr):
    """Item to (expert, first row, valid rows, column), a group of tiles for each column."""
    group = item // (GROUP * columns)
    first = group * GROUP
    size = min(num_tiles - first, GROUP)
    within = item - group * GROUP * columns
    tile_ptr = tiles_ptr + (first + within % size) * 4
    return gl.load(tile_ptr), gl.load(tile_ptr + 1), gl.load(tile_ptr + 2), within // size


@gluon.jit
def _copy_warp(descs, buffers, bars, sizes, tiles_ptr, claims_ptr,
               GROUP: gl.constexpr, SPLITS: gl.constexpr):  # fmt: skip
    a_desc, w_desc, _ = descs
    a_bufs, w_bufs, _, items = buffers
    empty, ready, item_free, item_posted = bars
    num_tiles, num_blocks, steps, _ = sizes
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    ROWS: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[2]
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_items = num_tiles * num_blocks * SPLITS
    item = gl.program_id(0)
    turn, count = 0, 0
    while item < num_items:
        mbarrier.wait(item_free.index(turn & 1), (turn >> 1 & 1) ^ 1)
        items.index(turn & 1).store(gl.full([32], item, gl.int32, LANES))
        mbarrier.arrive(item_posted.index(turn & 1))
        # Claimed early: the answer comes while this item's copies are started.
        claimed = gl.atomic_add(claims_ptr, 1)
        expert, row, valid, column = _locate(item, num_tiles, num_blocks * SPLITS, tiles_ptr, GROUP)
        both = valid > ROWS
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, w_desc.block_type.nbytes + a_desc.block_type.nbytes, pred=not both)
            mbarrier.expect(bar, w_desc.block_type.nbytes + 2 * a_desc.block_type.nbytes, pred=both)
            k = (column % SPLITS * steps + step) * BLOCK_K
            tma.async_copy_global_to_shared(
                w_desc, [expert, 0, column // SPLITS * COLUMNS, k], bar, w_bufs.index(stage)
            )
            tma.async_copy_global_to_shared(a_desc, [row, k], bar, a_bufs.index(2 * stage))
            tma.async_copy_global_to_shared(
                a_desc, [row + ROWS, k], bar, a_bufs.index(2 * stage + 1), pred=both
            )
            count += 1
        item = gl.num_programs(0) + claimed
        turn += 1
    mbarrier.wait(item_free.index(turn & 1), (turn >> 1 & 1) ^ 1)
    items.index(turn & 1).store(gl.full([32], item, gl.int32, LANES))
    mbarrier.arrive(item_posted.index(turn & 1))


@gluon.jit
def _next_item(items, item_free, item_posted, turn):
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(item_posted.index(turn & 1), turn >> 1 & 1)
    item = gl.max(items.index(turn & 1).load(LANES), 0)
    mbarrier.arrive(item_free.index(turn & 1))
    return item


@gluon.jit
def _write(out_desc, out_buf, value, row, column):
    # The buffer is free once the copy engine has read what was in it.
    tma.store_wait(0)
    out_buf.store(value)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_buf)


@gluon.jit
def _multiply_warps(descs, buffers, bars, sizes, tiles_ptr, WHICH: gl.constexpr,
                    SWIGLU: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr,
                    LAYOUT: gl.constexpr, W_LAYOUT: gl.constexpr):  # fmt: skip
    a_desc, w_desc, out_desc = descs
    a_bufs, w_bufs, out_bufs, items = buffers
    empty, ready, item_free, item_posted = bars
    num_tiles, num_blocks, steps, capacity = sizes
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    ROWS: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[1] * w_desc.block_type.shape[2]
    OUT_N: gl.constexpr = out_desc.block_type.shape[1]
    out_buf = out_bufs.index(WHICH)
    num_items = num_tiles * num_blocks * SPLITS
    item = _next_item(items, item_free, item_posted, 0)
    turn, count = 1, 0
    while item < num_items:
        _, row, valid, column = _locate(item, num_tiles, num_blocks * SPLITS, tiles_ptr, GROUP)
        if valid > WHICH * ROWS:
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
            for step in range(steps):
                stage = count % STAGES
                mbarrier.wait(ready.index(stage), count // STAGES & 1)
                w = w_bufs.index(stage)._reinterpret(w_desc.dtype, [BLOCK_N, BLOCK_K], W_LAYOUT)
                acc = warpgroup_mma(
                    a_bufs.index(2 * stage + WHICH), w.permute((1, 0)), acc, is_async=True
                )
                # The product before this one is done: its buffers may be filled again.
                acc = warpgroup_mma_wait(1, (acc,))
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=step > 0)
                count += 1
            acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
            low, high = gl.split(acc.reshape((ROWS, 2, BLOCK_N // 2)).permute((0, 2, 1)))
            row += WHICH * ROWS + column % SPLITS * capacity
            column = column // SPLITS
            if SWIGLU:
                h = low / (1.0 + gl.exp(-low)) * high
                _write(out_desc, out_buf, h.to(out_desc.dtype), row, column * OUT_N)
            else:
                _write(out_desc, out_buf, low.to(out_desc.dtype), row, column * BLOCK_N)
                _write(out_desc, out_buf, high.to(out_desc.dtype), row, column * BLOCK_N + OUT_N)
        else:
            for _ in range(steps):
                stage = count % STAGES
                mbarrier.wait(ready.index(stage), count // STAGES & 1)
                mbarrier.arrive(empty.index(stage))
                count += 1
        item = _next_item(items, item_free, item_posted, turn)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_blocks", "steps", "capacity"])
def _grouped_gemm_kernel(
    a_desc, w_desc, out_desc, tiles_ptr, counters_ptr, num_blocks, steps, capacity,
    SWIGLU: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[1] * w_desc.block_type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], a_desc.dtype)
    A_SHAPE: gl.constexpr = a_desc.block_type.shape
    W_SHAPE: gl.constexpr = w_desc.block_type.shape
    OUT_SHAPE: gl.constexpr = out_desc.block_type.shape
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES] + A_SHAPE, a_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + W_SHAPE, w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2] + OUT_SHAPE, out_desc.layout)
    items = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_posted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(item_free.index(i), count=2)
        mbarrier.init(item_posted.index(i), count=1)
    claims_ptr = counters_ptr + (1 if SWIGLU else 2)
    descs = (a_desc, w_desc, out_desc)
    buffers = (a_bufs, w_bufs, out_bufs, items)
    bars = (empty, ready, item_free, item_posted)
    sizes = (gl.load(counters_ptr), num_blocks, steps, capacity)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply_warps, (descs, buffers, bars, sizes, tiles_ptr,
                               first, SWIGLU, GROUP, SPLITS, LAYOUT, W_LAYOUT)),
            (_multiply_warps, (descs, buffers, bars, sizes, tiles_ptr,
                               second, SWIGLU, GROUP, SPLITS, LAYOUT, W_LAYOUT)),
            (_copy_warp, (descs, buffers, bars, sizes, tiles_ptr, claims_ptr, GROUP, SPLITS)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def grouped_gemm_hopper(
    a: Tensor, weight: Tensor, order: ExpertOrder, *, swiglu: bool, processors: int,
    splits: int = 1, group: int = _GROUP_TILES, stages: int = _STAGES,
) -> Tensor:  # fmt: skip
    """Products of sorted rows with their experts' weights, the activation fused in.

    Args:
        a: bfloat16 or float16 [capacity, K], rows in the order of ``order``.
        weight: [num_experts, N, K], contiguous; gate rows before up rows when ``swiglu``.
        order: starts aligned to ``HALF``, tiles of ``TILE`` rows, counters not yet used.
        splits: parts into which each sum over K is cut, more work items when there are few.

    Returns:
        [splits, capacity, N], to be added up; or with ``swiglu`` [1, capacity, N / 2]:
        ``silu(gate) * up``.
    """
    num_experts, rows, depth = weight.shape
    parts = 2 if swiglu else 1
    columns = rows // parts
    out = a.new_empty((splits, a.shape[0], columns))
    dtype = gl.bfloat16 if a.dtype == torch.bfloat16 else gl.float16
    w_view = weight.view(num_experts, parts, columns, depth)

    def describe(tensor: Tensor, block: list[int]):
        return TensorDescriptor.from_tensor(
            tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype)
        )

    _grouped_gemm_kernel[(processors,)](
        describe(a, [HALF, _BLOCK_K]),
        describe(w_view, [1, parts, _BLOCK_N // parts, _BLOCK_K]),
        describe(out.view(-1, columns), [HALF, _BLOCK_N // 2]),
        order.tiles, order.counters, triton.cdiv(columns, _BLOCK_N // parts),
        triton.cdiv(triton.cdiv(depth, _BLOCK_K), splits), a.shape[0],
        SWIGLU=swiglu, SPLITS=splits, STAGES=stages, GROUP=group,
        MULTIPLY_REGISTERS=_MULTIPLY_REGISTERS, COPY_REGISTERS=_COPY_REGISTERS,
        num_warps=4, maxnreg=_MAX_REGISTERS,
    )  # fmt: skip
    return out
