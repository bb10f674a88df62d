# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The mixture-of-experts block on CUDA: three ways, by how many rows an expert gets.

- *vector*: a handful of pairs. Each pair streams its expert's weights through plain multiply-adds;
  two launches, and no sort, since pairs seldom share an expert.
- *tile*: few rows per expert, bound by the bytes of the weights. Tensor cores take the weights as
  the tall side (64 rows at least) and the tokens as the narrow one (16 to 64), so that one token
  is not padded to 64.
- *wide*: many rows, bound by arithmetic: see ``fused_moe_triton_hopper``.

Bytes: each expert in use once, ``3 * hidden * inner`` elements. Operations:
``6 * hidden * inner`` for each pair. No way asks the host anything: all can be captured. The host
works out the launches (2 for a vector, 4 up to 8192 pairs, then 6) once for a shape: see
``replay_triton``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from ch15_helpers.kernels.moe_fp8 import BLOCK, dequantise_blocks
from ch15_helpers.kernels.moe_permute import ExpertOrder, sort_by_expert
from ch15_helpers.kernels.moe_permute_triton import combine_triton, early, gather_rows_triton
from ch15_helpers.kernels.replay_triton import Replayed, recordable

_VARYING = ("num_pairs", "stride_x")


@recordable
@triton.jit
def _vector_gate_up_kernel(
    x_ptr, w_ptr, scale_ptr, h_ptr, ids_ptr, stride_x, hidden, inner,
    E: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_ptr += pair // TOP_K * stride_x
    w_rows = w_ptr + (expert * 2 * inner + n) * hidden
    gate = tl.zeros([ROWS, BLOCK_K], tl.float32)
    up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (n < inner)[:, None] & (k < hidden)[None, :]
        x = tl.load(x_ptr + k, mask=k < hidden, other=0.0).to(tl.float32)[None, :]
        w = w_rows[:, None] + k[None, :]
        x_gate, x_up = x, x
        if SCALE:
            row = expert * 2 * tl.cdiv(inner, SCALE) + tl.program_id(0) * ROWS // SCALE
            scale = scale_ptr + row * tl.cdiv(hidden, SCALE) + (k // SCALE)[None, :]
            x_gate = x * tl.load(scale, mask=(k < hidden)[None, :], other=0.0)
            scale += tl.cdiv(inner, SCALE) * tl.cdiv(hidden, SCALE)
            x_up = x * tl.load(scale, mask=(k < hidden)[None, :], other=0.0)
        gate += tl.load(w, mask=mask, other=0.0).to(tl.float32) * x_gate
        up += tl.load(w + inner * hidden, mask=mask, other=0.0).to(tl.float32) * x_up
    g = tl.sum(gate, 1)
    h = g * tl.sigmoid(g) * tl.sum(up, 1)
    tl.store(h_ptr + pair * inner + n, h.to(h_ptr.dtype.element_ty), mask=n < inner)


@recordable
@triton.jit
def _vector_down_kernel(
    h_ptr, w_ptr, scale_ptr, out_ptr, ids_ptr, weights_ptr, hidden, inner,
    E: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        if (expert >= 0) & (expert < E):
            weight = tl.load(weights_ptr + pair).to(tl.float32)
            w_rows = w_ptr + (expert * hidden + n) * inner
            for start in range(0, inner, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                mask = (n < hidden)[:, None] & (k < inner)[None, :]
                h = tl.load(h_ptr + pair * inner + k, mask=k < inner, other=0.0).to(tl.float32)
                if SCALE:
                    row = expert * tl.cdiv(hidden, SCALE) + tl.program_id(0) * ROWS // SCALE
                    scale = scale_ptr + row * tl.cdiv(inner, SCALE) + k // SCALE
                    h *= tl.load(scale, mask=k < inner, other=0.0)
                w = tl.load(w_rows[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
                total += w * (weight * h)[None, :]
    out = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + n, out, mask=n < hidden)


@triton.jit
def _add_product(acc, w, a, scale, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    if SCALE:
        acc += tl.dot(w.to(a.dtype), a, input_precision=PRECISION) * scale
    else:
        acc = tl.dot(w, a, acc, input_precision=PRECISION)
    return acc


@recordable
@triton.jit(do_not_specialize=_VARYING)
def _tile_kernel(
    a_ptr, w_desc, scale_ptr, out_ptr, rows_ptr, tiles_ptr, counters_ptr,
    num_pairs, stride_a, depth, columns,
    FIRST: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``FIRST``: tokens' rows to silu(gate) * up. Else: sorted rows to the down projection."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tile = tl.program_id(1)
    if tile >= tl.load(counters_ptr):
        return
    expert = tl.load(tiles_ptr + tile * 4)
    row = tl.load(tiles_ptr + tile * 4 + 1) + tl.arange(0, BLOCK_M)
    pair = tl.load(rows_ptr + row)
    real = pair < num_pairs
    source = pair // TOP_K if FIRST else row
    a_rows = a_ptr + source.to(tl.int64) * stride_a
    column = tl.program_id(0) * BLOCK_N
    w_row = expert * columns * (2 if FIRST else 1) + column
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if SCALE:
        # Scales of gate blocks, then of up blocks; a tile lies within one block of either side.
        blocks = tl.cdiv(columns, SCALE) * tl.cdiv(depth, SCALE)
        scale_ptr += expert * blocks * (2 if FIRST else 1)
        scale_ptr += column // SCALE * tl.cdiv(depth, SCALE)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = real[:, None] & (k < depth)[None, :]
        a = tl.trans(tl.load(a_rows[:, None] + k[None, :], mask=mask, other=0.0))
        scale, up_scale = 1.0, 1.0
        if SCALE:
            scale = tl.load(scale_ptr + start // SCALE)
            if FIRST:
                up_scale = tl.load(scale_ptr + blocks + start // SCALE)
        acc = _add_product(acc, w_desc.load([w_row, start]), a, scale, SCALE, PRECISION)
        if FIRST:
            w = w_desc.load([w_row + columns, start])
            up = _add_product(up, w, a, up_scale, SCALE, PRECISION)
    if FIRST:
        acc = acc * tl.sigmoid(acc) * up
    n = column + tl.arange(0, BLOCK_N)
    out = out_ptr + row.to(tl.int64)[:, None] * columns + n[None, :]
    mask = real[:, None] & (n < columns)[None, :]
    tl.store(out, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class MoEPlan:
    """How one call runs: ``kind`` is vector, tile or wide; the rest are its block sizes.

    Attributes:
        gather: whether the wide kernel gathers tokens' rows itself.
    """

    kind: str
    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    num_stages: int = 5
    num_warps: int = 4
    gather: bool = True


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter, used to debug without a GPU.
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _has_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def choose_plan(
    num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype, wide: bool
) -> MoEPlan:
    """The way for a number of tokens, from rows per expert if routing were even.

    Args:
        wide: whether the device can run the wide kernel.
    """
    num_pairs = num_tokens * top_k
    if num_tokens == 1 or 4 * num_pairs <= num_experts:
        return MoEPlan("vector", block_n=2, block_k=1024, num_warps=2)
    rows = num_pairs / num_experts
    if dtype == torch.float32:
        return MoEPlan("tile", block_m=16 if rows < 16 else 32, block_k=32)
    # Captured on one H200, bf16 (µs, tile and wide). Qwen3-30B-A3B's sizes: 16 rows an expert 310
    # and 364, 32 rows 361 and 340, 64 rows 464 and 358. Mixtral's: 16 rows 650 and 688, 32 rows
    # 690 and 676, 64 rows 1042 and 704.
    if wide and rows >= 32:
        return MoEPlan("wide")
    # More than the mean, so that few experts need a second tile and read their weights again:
    # Mixtral with 16 rows an expert takes 890 in tiles of 16 and 650 in tiles of 32.
    block_m = min(64, max(16, triton.next_power_of_2(int(1.5 * rows))))
    return MoEPlan("tile", block_m=block_m)


def _run_vector(x, gate_up, down, weights, experts, scales, plan) -> Tensor:
    (num_tokens, hidden), (num_experts, _, inner) = x.shape, down.shape
    top_k = experts.shape[1]
    h = x.new_empty((num_tokens * top_k, inner))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, warps, scale = plan.block_n, plan.num_warps, BLOCK if scales else 0
    gate_up_scale, down_scale = scales or (None, None)
    _vector_gate_up_kernel[(triton.cdiv(inner, rows), num_tokens * top_k)](
        x, gate_up, gate_up_scale, h, experts, x.stride(0), hidden, inner, num_experts, top_k,
        rows, min(plan.block_k, triton.next_power_of_2(hidden)), scale, num_warps=warps, **early(x),
    )  # fmt: skip
    _vector_down_kernel[(triton.cdiv(hidden, rows), num_tokens)](
        h, down, down_scale, out, experts, weights, hidden, inner, num_experts, top_k,
        rows, min(plan.block_k, triton.next_power_of_2(inner)), scale, num_warps=warps, **early(x),
    )  # fmt: skip
    return out


def _multiply_tiles(a, weight, scale, out, order: ExpertOrder, top_k, first, plan):
    """One of the two products: ``first`` reads tokens' rows, the second sorted ones."""
    depth, columns = weight.shape[2], out.shape[1]
    block_n = plan.block_n if first else 2 * plan.block_n
    w_desc = TensorDescriptor.from_tensor(weight.view(-1, depth), [block_n, plan.block_k])
    _tile_kernel[(triton.cdiv(columns, block_n), order.tiles.shape[0])](
        a, w_desc, scale, out, order.rows, order.tiles, order.counters, order.positions.shape[0],
        a.stride(0), depth, columns, FIRST=first, TOP_K=top_k, BLOCK_M=plan.block_m,
        BLOCK_N=block_n, BLOCK_K=plan.block_k, SCALE=0 if scale is None else BLOCK,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps, num_stages=plan.num_stages, **early(a),
    )  # fmt: skip


def _run_tile(x, gate_up, down, weights, experts, scales, plan) -> Tensor:
    num_experts, hidden, inner = down.shape
    top_k = experts.shape[1]
    gate_up_scale, down_scale = scales or (None, None)
    order = sort_by_expert(experts, num_experts, plan.block_m, plan.block_m)
    h, y = x.new_empty((order.capacity, inner)), x.new_empty((order.capacity, hidden))
    _multiply_tiles(x, gate_up, gate_up_scale, h, order, top_k, True, plan)
    _multiply_tiles(h, down, down_scale, y, order, top_k, False, plan)
    return combine_triton(y, order.positions, weights)


def _run_wide(x, gate_up, down, weights, experts, scales, plan) -> Tensor:
    from ch15_helpers.kernels import fused_moe_triton_hopper as hopper

    if scales is not None:
        inner = down.shape[2]
        halves = gate_up.view(down.shape[0], 2, inner, -1)
        gate_up = dequantise_blocks(halves, scales[0], x.dtype).flatten(1, 2)
        down = dequantise_blocks(down, scales[1], x.dtype)
    order = sort_by_expert(experts, down.shape[0], hopper.HALF, hopper.TILE)
    top_k = experts.shape[1] if plan.gather and hopper.can_gather(x) else 0
    rows = x if top_k else gather_rows_triton(x, order, experts.shape[1])
    processors = _processors(x.device)
    h = hopper.grouped_gemm(rows, gate_up, order, swiglu=True, top_k=top_k, processors=processors)
    # Mixtral with 1024 tokens has 2.2 rounds of down tiles, which took 3 rounds: 568 µs. With the
    # half-empty tiles last it takes 492. Many items, or short ones, level themselves out.
    items = experts.numel() / hopper.TILE * down.shape[1] / hopper.BLOCK_N
    tall_first = down.shape[2] >= 4096 and items < 4 * processors
    y = hopper.grouped_gemm(
        h, down, order, swiglu=False, processors=processors, tall_first=tall_first
    )
    return combine_triton(y, order.positions, weights)


_WAYS = MappingProxyType({"vector": _run_vector, "tile": _run_tile, "wide": _run_wide})


def _run(x, gate_up, down, weights, experts, *scales_and_plan) -> Tensor:
    *scales, plan = scales_and_plan
    run: Callable[..., Tensor] = _WAYS[plan.kind]
    return run(
        x, gate_up, down, weights.contiguous(), experts.contiguous(), tuple(scales) or None, plan
    )


_replayed = Replayed(_run)


@functools.cache
def _plan_for(
    num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype, fp8: bool, hopper: bool
) -> MoEPlan:
    # FP8 goes wide later: that way takes the experts in the activations' type.
    wide = hopper and (not fp8 or num_tokens * top_k / num_experts > 256)
    return choose_plan(num_tokens, top_k, num_experts, dtype, wide)


def fused_moe_triton(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    plan: MoEPlan | None = None,
) -> Tensor:
    """See :func:`ch15_helpers.kernels.fused_moe.fused_moe`; ``plan`` overrides the choice."""
    if plan is None:
        sizes = x.shape[0], experts.shape[1], down.shape[0]
        plan = _plan_for(*sizes, x.dtype, scales is not None, _has_wgmma(x.device))
    given = (x, gate_up, down, weights, experts, *(scales or ()))
    simple = weights.is_contiguous() and experts.is_contiguous()
    if simple and not (scales and plan.kind == "wide"):
        return _replayed(given, plan)
    return _run(*given, plan)
