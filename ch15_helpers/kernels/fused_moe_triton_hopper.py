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

import functools

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

from ch15_helpers.kernels.fused_moe_copy_triton_hopper import copy_warps, locate, next_item
from ch15_helpers.kernels.moe_permute import ExpertOrder
from ch15_helpers.kernels.replay_triton import recordable

HALF = 64  # rows of one group of warps; experts start at multiples of it
TILE = 2 * HALF
BLOCK_N, _BLOCK_K = 256, 64
_STAGES = 4
_GROUP_TILES = 8  # tiles that share a block of weights while it is in the cache
_MAX_REGISTERS = 168  # 12 warps share 65536


@gluon.jit
def wait_for_the_kernel_before():
    """What the kernel before wrote is there; from here on the next one may be launched."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _write(out_desc, out_buf, value, row, column):
    # The buffer is free once the copy engine has read what was in it.
    tma.store_wait(0)
    out_buf.store(value)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_buf)


@gluon.jit
def _multiply_warps(descs, buffers, bars, sizes, tiles_ptr, WHICH: gl.constexpr,
                    GATHER: gl.constexpr, SWIGLU: gl.constexpr, GROUP: gl.constexpr,
                    TALL_FIRST: gl.constexpr, LAYOUT: gl.constexpr,
                    W_LAYOUT: gl.constexpr):  # fmt: skip
    w_desc, out_desc = descs
    a_bufs, w_bufs, out_bufs, items = buffers
    empty, ready, item_free, item_posted = bars
    num_tiles, num_blocks, steps = sizes
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    ROWS: gl.constexpr = a_bufs.type.shape[1]
    BLOCK_K: gl.constexpr = a_bufs.type.shape[2]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[1] * w_desc.block_type.shape[2]
    OUT_N: gl.constexpr = out_desc.block_type.shape[1]
    out_buf = out_bufs.index(WHICH)
    num_items = num_tiles * num_blocks
    item = next_item(items, item_free, item_posted, 0)
    turn, count = 1, 0
    while item < num_items:
        _, row, valid, column = locate(item, num_tiles, num_blocks, tiles_ptr, GROUP, TALL_FIRST)
        if valid > WHICH * ROWS:
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
            for step in range(steps):
                stage = count % STAGES
                mbarrier.wait(ready.index(stage), count // STAGES & 1)
                if GATHER:
                    # Tensor cores read through another path than the threads' copies wrote.
                    fence_async_shared()
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
            row += WHICH * ROWS
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
        item = next_item(items, item_free, item_posted, turn)
        turn += 1
    tma.store_wait(0)


@recordable
@gluon.jit(do_not_specialize=["num_blocks", "steps", "num_pairs"])
def _grouped_gemm_kernel(
    a_desc, a_ptr, rows_ptr, w_desc, out_desc, tiles_ptr, counters_ptr,
    num_pairs, stride, num_blocks, steps,
    GATHER: gl.constexpr, TOP_K: gl.constexpr, SWIGLU: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    TALL_FIRST: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[1] * w_desc.block_type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], w_desc.dtype)
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], w_desc.dtype)
    W_SHAPE: gl.constexpr = w_desc.block_type.shape
    OUT_SHAPE: gl.constexpr = out_desc.block_type.shape
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, ROWS, BLOCK_K], A_LAYOUT)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + W_SHAPE, w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2] + OUT_SHAPE, out_desc.layout)
    items = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_posted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=2)
        # The bulk copies arrive as one; each of 128 threads that copy rows for itself.
        mbarrier.init(ready.index(i), count=129 if GATHER else 1)
    for i in gl.static_range(2):
        mbarrier.init(item_free.index(i), count=2)
        mbarrier.init(item_posted.index(i), count=1)
    claims_ptr = counters_ptr + (1 if SWIGLU else 2)
    wait_for_the_kernel_before()
    descs = (w_desc, out_desc)
    buffers = (a_bufs, w_bufs, out_bufs, items)
    bars = (empty, ready, item_free, item_posted)
    sizes = (gl.load(counters_ptr), num_blocks, steps)
    if GATHER:
        a = (a_ptr, rows_ptr, num_pairs, stride)
    else:
        a = a_desc
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    # 12 warps of 168 registers a thread: what the copying warps leave, the others take.
    COPY_WARPS: gl.constexpr = 4 if GATHER else 1
    COPY_REGISTERS: gl.constexpr = 72 if GATHER else 24
    MULTIPLY_REGISTERS: gl.constexpr = 216 if GATHER else 240
    gl.warp_specialize(
        [
            (_multiply_warps, (descs, buffers, bars, sizes, tiles_ptr,
                               first, GATHER, SWIGLU, GROUP, TALL_FIRST, LAYOUT, W_LAYOUT)),
            (_multiply_warps, (descs, buffers, bars, sizes, tiles_ptr,
                               second, GATHER, SWIGLU, GROUP, TALL_FIRST, LAYOUT, W_LAYOUT)),
            (copy_warps, (a, descs, buffers, bars, sizes, tiles_ptr, claims_ptr,
                           GATHER, TOP_K, GROUP, TALL_FIRST)),
        ],
        [4, COPY_WARPS],
        [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype):
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


def _describe(tensor: Tensor, *block: int):
    layout = _layout(block, tensor.dtype)
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block), layout)


def can_gather(x: Tensor) -> bool:
    """Whether the kernel can gather these rows: whole pieces of K, aligned, nothing to zero."""
    return x.shape[1] % _BLOCK_K == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def grouped_gemm(
    a: Tensor, weight: Tensor, order: ExpertOrder, *, swiglu: bool, processors: int,
    top_k: int = 0, tall_first: bool = False,
) -> Tensor:  # fmt: skip
    """Products of sorted rows with their experts' weights, the activation fused in.

    Args:
        a: bfloat16 or float16 [capacity, K], rows in the order of ``order``; or, with ``top_k``,
            tokens' rows [num_tokens, K], which the kernel then gathers (see ``can_gather``).
        weight: [num_experts, N, K], contiguous; gate rows before up rows when ``swiglu``.
        order: starts aligned to ``HALF``, tiles of ``TILE`` rows, counters not yet used.
        tall_first: whether tiles of at most ``HALF`` rows wait for the others. Their experts'
            weights are then read again, but with few long items the last programs end sooner.

    Returns:
        [capacity, N]; with ``swiglu`` [capacity, N / 2]: ``silu(gate) * up``.
    """
    num_experts, rows, depth = weight.shape
    parts = 2 if swiglu else 1
    columns = rows // parts
    out = a.new_empty((order.capacity, columns))
    w_view = weight.view(num_experts, parts, columns, depth)
    out_desc = _describe(out, HALF, BLOCK_N // 2)
    _grouped_gemm_kernel[(processors,)](
        None if top_k else _describe(a, HALF, _BLOCK_K),
        a if top_k else None, order.rows if top_k else None,
        _describe(w_view, 1, parts, BLOCK_N // parts, _BLOCK_K), out_desc,
        order.tiles, order.counters, order.positions.shape[0], a.stride(0),
        triton.cdiv(columns, BLOCK_N // parts),
        triton.cdiv(depth, _BLOCK_K),
        GATHER=top_k > 0, TOP_K=top_k, SWIGLU=swiglu, ROWS=HALF, BLOCK_K=_BLOCK_K,
        STAGES=_STAGES, GROUP=_GROUP_TILES, TALL_FIRST=tall_first, num_warps=4,
        maxnreg=_MAX_REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return out
