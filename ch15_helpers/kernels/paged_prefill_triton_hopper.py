# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Gluon reads the kernels' signatures itself: constexpr, pointers and strides have no Python types.
"""The prompt attention kernel for Hopper: copy engine, tensor cores and softmax at the same time.

FlashAttention-3 (Shah et al., 2024) in Gluon, the level of Triton at which a program places its
own barriers and shared memory. One program has three roles. One warp keeps the bulk copy engine
busy with tiles of K and V. Two warpgroups own 64 query rows each: while the tensor cores multiply
``P V`` of one tile, the warpgroup already has the scores of the next tile under way and does their
softmax, and while one warpgroup does softmax, the other one multiplies.

K and V come gathered (:mod:`ch15_helpers.kernels.kv_gather_triton`): the copy engine wants
rectangles, and the gather costs a few per cent of the arithmetic of a long prompt. The rows of a
tile are ``tokens x query heads of one KV head``, so that K and V are read once for the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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

from ch15_helpers.kernels.attention_tile_triton import LOG2E
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.batch_split import upload_int32
from ch15_helpers.kernels.dispatch import num_processors
from ch15_helpers.kernels.kv_gather_triton import gather_kv_triton
from ch15_helpers.kernels.prefill_plan import plan_prefill

ROWS = 128
_MAX_GATHERED_BYTES = 1 << 30


@gluon.jit
def _wait_slot(barriers, count, wanted, STAGES: gl.constexpr):
    """Waits, where ``wanted``, until slot ``count % STAGES`` of a ring holds its ``count``-th."""
    mbarrier.wait(barriers.index(count % STAGES), (count // STAGES) & 1, pred=wanted)


@gluon.jit
def _copy_tile(desc, row, column, smem, full, empty, count, STAGES: gl.constexpr):
    slot = count % STAGES
    # The first round finds the ring empty: a fresh barrier counts as complete for phase 1.
    mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(slot), smem.index(slot))


@gluon.jit
def _item(items_ptr, index):
    """First query row, queries, first gathered row, position of the first query, KV head."""
    item = items_ptr + index * 5
    return gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3), gl.load(item + 4)


@gluon.jit
def _producer(
    k_desc, v_desc, items_ptr, num_items, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Streams the K and V tiles of this program's items, last tile of each item first."""
    count = 0
    for index in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _, q_len, kv_row, start, head = _item(items_ptr, index)
        column = head * D
        for tile in range((start + q_len + BLOCK_N - 1) // BLOCK_N - 1, -1, -1):
            row = kv_row + tile * BLOCK_N
            _copy_tile(k_desc, row, column, k_smem, k_full, k_empty, count, STAGES)
            _copy_tile(v_desc, row, column, v_smem, v_full, v_empty, count, STAGES)
            count += 1


@gluon.jit
def _hide(s, first_key, positions, HIDE_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Scores of keys after a row's own position become so low that their weight is 0.

    Not minus infinity: a row may see nothing of its first tile, and the difference of two
    infinities is NaN. A power of two, so that scaling it rounds nothing and the difference is 0.
    What such a row sums up is wiped by the rescaling of the next tile.
    """
    keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, HIDE_LAYOUT))
    return gl.where(keys[None, :] <= positions[:, None], s, -1.2676506002282294e30)


@gluon.jit
def _scores(q_tile, k_smem, zeros, count, STAGES: gl.constexpr):
    """Starts the product of the queries and the ``count``-th tile of keys."""
    k_tile = k_smem.index(count % STAGES).permute((1, 0))
    return warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)


@gluon.jit
def _weights(s, m, scale_log2):
    """Softmax weights under a new maximum of each row, and what the older ones are scaled by."""
    m_new = gl.maximum(m, gl.max(s, 1))
    alpha = gl.exp2((m - m_new) * scale_log2)
    return gl.exp2(s * scale_log2 - (m_new * scale_log2)[:, None]), m_new, alpha


@gluon.jit
def _rows(ptr, first_row, num_tokens, first_head, half, stride_token, stride_head,
          GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D_REAL: gl.constexpr, D: gl.constexpr,
          LAYOUT: gl.constexpr):  # fmt: skip
    """Pointers to 64 rows of a tile, [64, D], and which of them exist."""
    row = half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    token, member = row // GROUP_PAD, row % GROUP_PAD
    mask = ((token < num_tokens) & (member < GROUP))[:, None] & (d < D_REAL)[None, :]
    at = (first_row + token).to(gl.int64) * stride_token + (first_head + member) * stride_head
    return ptr + at[:, None] + d[None, :], mask


@gluon.jit
def _consumer(
    half, q_ptr, out_ptr, items_ptr, num_items, scale_log2,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head,
    q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D_REAL: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of 64 rows of each item; ``half`` says which 64."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    IO_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_smem.dtype
    row = half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    q_tile = q_smem.index(half)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    count = 0
    for index in range(gl.program_id(0), num_items, gl.num_programs(0)):
        q_row, q_len, _, start, head = _item(items_ptr, index)
        rows, mask = _rows(q_ptr, q_row, q_len, head * GROUP, half, stride_q_token, stride_q_head,
                           GROUP, GROUP_PAD, D_REAL, D, IO_LAYOUT)  # fmt: skip
        q_tile.store(gl.load(rows, mask=mask, other=0.0))
        fence_async_shared()
        positions = start + row // GROUP_PAD
        tile = (start + q_len + BLOCK_N - 1) // BLOCK_N - 1
        _wait_slot(k_full, count, True, STAGES)
        s = warpgroup_mma_wait(0, deps=[_scores(q_tile, k_smem, zeros, count, STAGES)])
        mbarrier.arrive(k_empty.index(count % STAGES))
        s = _hide(s, tile * BLOCK_N, positions, S_LAYOUT, BLOCK_N)
        p, m, _ = _weights(s, gl.max(s, 1), scale_log2)
        denom = gl.sum(p, 1)
        p = gl.convert_layout(p.to(dtype), P_LAYOUT)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        _wait_slot(k_full, count + 1, tile > 0, STAGES)
        while tile > 0:
            tile -= 1
            s = _scores(q_tile, k_smem, zeros, count + 1, STAGES)
            _wait_slot(v_full, count, True, STAGES)
            acc = warpgroup_mma(p, v_smem.index(count % STAGES), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index((count + 1) % STAGES))
            if tile >= (start + 1) // BLOCK_N:
                s = _hide(s, tile * BLOCK_N, positions, S_LAYOUT, BLOCK_N)
            p_new, m, alpha = _weights(s, m, scale_log2)
            denom = denom * alpha + gl.sum(p_new, 1)
            # Waiting here, not at the top, keeps ptxas from moving the wait for P V before softmax.
            _wait_slot(k_full, count + 2, tile > 0, STAGES)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(v_empty.index(count % STAGES))
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
            p = gl.convert_layout(p_new.to(dtype), P_LAYOUT)
            count += 1
        _wait_slot(v_full, count, True, STAGES)
        acc = warpgroup_mma(p, v_smem.index(count % STAGES), acc)
        mbarrier.arrive(v_empty.index(count % STAGES))
        count += 1
        acc = acc / gl.convert_layout(denom, gl.SliceLayout(1, O_LAYOUT))[:, None]
        rows, mask = _rows(out_ptr, q_row, q_len, head * GROUP, half, stride_out_token,
                           stride_out_head, GROUP, GROUP_PAD, D_REAL, D, IO_LAYOUT)  # fmt: skip
        gl.store(rows, gl.convert_layout(acc.to(dtype), IO_LAYOUT), mask=mask)


@gluon.jit(do_not_specialize=("num_items",))
def _prefill_hopper_kernel(
    q_ptr, k_desc, v_desc, out_ptr, items_ptr, num_items, scale_log2,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D_REAL: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 64, D], k_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (
            0, q_ptr, out_ptr, items_ptr, num_items, scale_log2,
            stride_q_token, stride_q_head, stride_out_token, stride_out_head,
            q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            GROUP, GROUP_PAD, D_REAL, D, BLOCK_N, STAGES)),
        (_consumer, (
            1, q_ptr, out_ptr, items_ptr, num_items, scale_log2,
            stride_q_token, stride_q_head, stride_out_token, stride_out_head,
            q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            GROUP, GROUP_PAD, D_REAL, D, BLOCK_N, STAGES)),
        (_producer, (
            k_desc, v_desc, items_ptr, num_items,
            k_smem, v_smem, k_full, k_empty, v_full, v_empty, BLOCK_N, D, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """What all layers of a step share.

    Attributes:
        items, offsets: see :func:`plan_prefill`, on the device.
        k, v: [tokens, num_kv_heads, d_pad], where K and V are gathered.
    """

    items: Tensor
    offsets: Tensor
    k: Tensor
    v: Tensor


def worth_gathering(q: Tensor, k_cache: Tensor, batch: BatchMetadata) -> bool:
    """Whether this kernel takes the batch: 16-bit queries, lengths known, long chunks.

    The gather costs a time per key, and this kernel saves one per pair of query and key. They
    were equal at 64 queries a key on an H200.
    """
    head_dim = q.shape[2]
    queries, keys = batch.query_lens_host, batch.context_lens_host
    if not len(queries) == len(keys) == batch.num_seqs or min(keys) == 0:
        return False
    gathered = 2 * sum(keys) * k_cache.shape[2] * _d_pad(head_dim) * q.element_size()
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and head_dim <= 256
        and gathered <= _MAX_GATHERED_BYTES
        and sum(n * c for n, c in zip(queries, keys, strict=True)) >= 64 * sum(keys)
    )


def paged_prefill_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of prompts and long chunks; see ``paged_attention_triton`` for the arguments.

    The batch must satisfy :func:`worth_gathering`.
    """
    head_dim, num_kv_heads = q.shape[2], k_cache.shape[2]
    group = q.shape[1] // num_kv_heads
    d_pad = _d_pad(head_dim)
    key = ("paged_prefill_hopper", group, num_kv_heads, d_pad, q.dtype)
    if key not in batch.scratch:
        batch.scratch[key] = _make_plan(batch, group, num_kv_heads, d_pad, q)
    plan: _Plan = batch.scratch[key]
    gather_kv_triton(
        k_cache, v_cache, batch.block_tables, batch.context_lens, plan.offsets,
        batch.max_context_len, plan.k, plan.v, k_scale, v_scale,
    )  # fmt: skip
    out = torch.empty_like(q) if out is None else out
    block_n, stages = (128, 2) if d_pad <= 128 else (64, 2)
    layout = gl.NVMMASharedLayout.get_default_for([block_n, d_pad], gl.bfloat16)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(kv.flatten(1), [block_n, d_pad], layout)
        for kv in (plan.k, plan.v)
    )
    num_items = plan.items.shape[0]
    _prefill_hopper_kernel[(min(num_items, num_processors(q.device)),)](
        q, k_desc, v_desc, out, plan.items, num_items, scale * LOG2E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        GROUP=group, GROUP_PAD=triton.next_power_of_2(group), D_REAL=head_dim, D=d_pad,
        BLOCK_N=block_n, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out


def _d_pad(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())


def _make_plan(batch: BatchMetadata, group: int, num_kv_heads: int, d_pad: int, q: Tensor) -> _Plan:
    items, offsets = plan_prefill(
        batch.query_lens_host,
        batch.context_lens_host,
        ROWS // triton.next_power_of_2(group),
        num_kv_heads,
        num_processors(q.device),
    )
    on_device = upload_int32(np.concatenate((items.ravel(), offsets)), q.device)
    shape = (sum(batch.context_lens_host), num_kv_heads, d_pad)
    return _Plan(
        items=on_device[: items.size].view(items.shape),
        offsets=on_device[items.size :],
        k=torch.empty(shape, device=q.device, dtype=q.dtype),
        v=torch.empty(shape, device=q.device, dtype=q.dtype),
    )
