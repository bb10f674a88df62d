"""All experts of a mixture-of-experts block at once: permute, two grouped products, combine.

On CUDA with Triton nothing here asks the host which experts run, so that a decode step can be
captured (see ``fused_moe_triton`` for the kernels and their limits). Elsewhere the same steps are
made of torch operations, in one of four ways, by size: the loop over experts that everybody
writes first spends ten small operations on each of them.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from ch15_helpers.kernels.dispatch import triton_installed, use_triton
from ch15_helpers.kernels.moe_fp8 import FP8, dequantise_blocks
from ch15_helpers.kernels.swiglu import swiglu

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, FP8)
# Below this many bytes of weights, copying one expert's weights for each pair and a single batched
# product cost less than sorting. Measured on one AVX-512 thread, 8 experts of 64 x 48, top 2 (µs,
# loop, copies, grouped): 1 token 53, 20, 51; 8 tokens 183, 44, 60. 32 experts of 128 x 64, top 4:
# 1 token 102, 31, 98; 4 tokens 305, 153, 135.
_COPY_BYTES = 512 * 1024
# As many pairs at most are sent one by one, as products of a matrix and a vector: nothing is sorted
# and nothing copied. Pairs that share an expert would read it twice, hence the second bound: pairs
# over experts in use. Measured as above (µs, loop, grouped or each, pair by pair): 64 experts of
# 256 x 128, top 8, 1 token 434, 393, 196; 4 tokens 1291, 1105, 813; 8 experts of 256 x 512, top 2,
# 1 token 258, 324, 158; 8 experts of 64 x 48, top 2, 1 token 74, 34 (copies), 26.
_FEW_PAIRS, _PAIRS_PER_EXPERT, _FEWEST_COPIES = 64, 1.4, 3
# Above this many bytes between the two products, one expert at a time stays in the cache. First
# shapes as above: 256 tokens 330 (loop), 167 (grouped), 202 (each); 1024 tokens 728, 1142, 563.
_CACHED_BYTES = 512 * 1024


@functools.cache
def can_fuse(device: torch.device, dtype: torch.dtype, hidden: int, inner: int) -> bool:
    """Whether the Triton kernels take experts of this type: nothing then waits for the host.

    Bulk copies need rows of whole 16 bytes, FP8 needs a GPU that knows it.
    """
    aligned = all(size * dtype.itemsize % 16 == 0 for size in (hidden, inner))
    known = device.type == "cuda" and triton_installed() and dtype in _FUSED_DTYPES
    if known and dtype == FP8:
        known = torch.cuda.get_device_capability(device) >= (8, 9)
    return known and aligned


def fused_moe(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each token through its experts: ``sum_j weights[t, j] * expert_j(x[t])``.

    An expert is ``down @ (silu(gate @ x) * (up @ x))``.

    Args:
        x: [num_tokens, hidden].
        gate_up: [num_experts, 2 * inner, hidden], gate rows first, contiguous.
        down: [num_experts, hidden, inner], contiguous.
        weights: float32 [num_tokens, top_k].
        experts: int64 or int32 [num_tokens, top_k]. An id outside ``0..num_experts-1`` belongs
            to another rank and adds nothing.
        scales: of gate_up [num_experts, 2, inner blocks, hidden blocks] and of down, when both
            are FP8: see :func:`ch15_helpers.kernels.moe_fp8.quantise_blocks`.

    Returns:
        [num_tokens, hidden] in ``x``'s type. Sums run in order of choice, so equal inputs give
        equal bits, and a NaN in one token stays in that token.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    hidden, inner = down.shape[1:]
    if use_triton(x, gate_up, down):
        if can_fuse(x.device, down.dtype, hidden, inner):
            from ch15_helpers.kernels.fused_moe_triton import fused_moe_triton

            return fused_moe_triton(x, gate_up, down, weights, experts, scales)
        sizes = f"{down.dtype} experts of {hidden} x {inner}"
        warnings.warn(f"the fused MoE kernels cannot take {sizes}: torch does", stacklevel=2)
    return fused_moe_torch(x, gate_up, down, weights, experts, scales)


def fused_moe_torch(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`fused_moe` in torch operations: the CPU's path, and the portable reference."""
    if scales is not None:
        gate_up, down, experts = _dequantise_used(gate_up, down, scales, experts, x.dtype)
    num_experts, inner = down.shape[0], down.shape[2]
    flat = experts.flatten()
    ours, few = _look(flat, down, x)
    if few:
        return _each_pair(x, gate_up, down, weights, experts)
    if ours and _fits(flat.numel(), down):
        return _copied_experts(x, gate_up, down, weights, flat)
    pairs = None if ours else ((flat >= 0) & (flat < num_experts)).nonzero().flatten()
    if pairs is not None:  # the others cost nothing: with one copy for a rank they are the most
        flat = flat.index_select(0, pairs)
    order = flat.argsort(stable=True)
    every = torch.arange(order.numel(), device=order.device)
    positions = torch.empty_like(order).scatter_(0, order, every)
    chosen = order if pairs is None else pairs.index_select(0, order)
    rows = x.index_select(0, chosen.div(experts.shape[1], rounding_mode="floor"))
    counts = torch.bincount(flat, minlength=num_experts)
    small = flat.numel() * 2 * inner * x.element_size() <= _CACHED_BYTES
    small &= 2 * flat.numel() > num_experts  # a grouped product looks at every expert
    if small and x.device.type == "cpu" and _can_group(gate_up, down):
        offsets = counts.cumsum(0).int()
        inner_rows = swiglu(grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets))
        y = grouped_mm(inner_rows, down.transpose(1, 2), offs=offsets)
    else:
        y = _each_expert(rows, gate_up, down, counts.tolist())
    if pairs is not None:
        return _combine_some(y, positions, weights, pairs)
    return _combine(y, positions.view(experts.shape), weights)


def _dequantise_used(
    gate_up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor],
    experts: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts in use in ``dtype``, and the ids by which they go there; others' ids are -1."""
    num_experts, hidden, inner = down.shape
    ours = (experts >= 0) & (experts < num_experts)
    used, ids = torch.unique(torch.where(ours, experts, 0), return_inverse=True)
    halves = gate_up.view(num_experts, 2, inner, hidden)
    # Bytes are gathered as integers: torch has no indexing of FP8 on every device.
    picked = [w.view(torch.uint8)[used].view(w.dtype) for w in (halves, down)]
    wide = [dequantise_blocks(w, s[used], dtype) for w, s in zip(picked, scales, strict=True)]
    return wide[0].flatten(1, 2), wide[1], torch.where(ours, ids, -1)


def _can_group(*weights: Tensor) -> bool:
    """Whether ``grouped_mm`` takes these weights: it wants rows of whole 16 bytes."""
    known = weights[0].dtype in (torch.float32, torch.bfloat16)
    return known and all(w.shape[2] * w.element_size() % 16 == 0 for w in weights)


def _look(flat: Tensor, down: Tensor, x: Tensor) -> tuple[bool, bool]:
    """Whether all ids are experts of ours, and whether pairs go one by one: sorting would not pay.

    That is where few pairs share an expert and copies do not fit, or there are hardly any.
    """
    if flat.numel() > _FEW_PAIRS or x.device.type != "cpu":
        lowest, highest = (int(bound) for bound in flat.aminmax())
        return lowest >= 0 and highest < down.shape[0], False
    ids = flat.tolist()
    ours = min(ids) >= 0 and max(ids) < down.shape[0]
    if ours and len(ids) > _PAIRS_PER_EXPERT * down.shape[0]:
        return ours, False
    known = ids if ours else [expert for expert in ids if 0 <= expert < down.shape[0]]
    few = x.dtype == torch.float32 and len(known) <= _PAIRS_PER_EXPERT * len(set(known))
    few = few and (len(known) < _FEWEST_COPIES or not _fits(len(known), down))
    return ours, few


def _fits(num_pairs: int, down: Tensor) -> bool:
    """Whether a copy of its expert's three matrices for each pair fits into the cache."""
    expert_bytes = 3 * down.shape[1] * down.shape[2] * down.element_size()
    return num_pairs * expert_bytes <= _COPY_BYTES


def _each_pair(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    num_experts, inner = down.shape[0], down.shape[2]
    out = torch.zeros_like(x)
    for row, total, choices, factors in zip(x, out, ids.tolist(), weights.tolist(), strict=True):
        for expert, factor in zip(choices, factors, strict=True):
            if 0 <= expert < num_experts:
                wide = torch.mv(gate_up[expert], row)
                gated = silu(wide[:inner], inplace=True).mul_(wide[inner:])
                total.addmv_(down[expert], gated, alpha=factor)
    return out


def _copied_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, flat: Tensor
) -> Tensor:
    num_tokens, top_k = weights.shape
    rows = x[:, None].expand(-1, top_k, -1).reshape(num_tokens * top_k, 1, -1)
    inner = swiglu(torch.bmm(rows, gate_up.index_select(0, flat).transpose(1, 2)))
    y = torch.bmm(inner, down.index_select(0, flat).transpose(1, 2))
    return (weights[:, :, None] * y.view(num_tokens, top_k, -1)).sum(1).to(x.dtype)


def _each_expert(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    y = rows.new_empty(rows.shape[0], down.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        mine = slice(start, start + count)
        gate, up = torch.mm(rows[mine], gate_up[expert].t()).chunk(2, dim=-1)
        inner = silu(gate, inplace=True).mul_(up)
        torch.mm(inner, down[expert].t(), out=y[mine])
        start += count
    return y


def _combine(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    if y.device.type == "cpu" and y.dtype != torch.float64:
        starts = torch.arange(0, positions.numel(), weights.shape[1])
        return _sum_bags(y.float(), positions.flatten(), starts, weights.flatten()).to(y.dtype)
    chosen = y.index_select(0, positions.flatten()).view(*positions.shape, -1)
    return (weights[:, :, None] * chosen).sum(1).to(y.dtype)


def _sum_bags(y: Tensor, rows: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
    """``functional.embedding_bag`` without its checks, which take as long at a few tokens."""
    added: Tensor = torch.embedding_bag(y, rows, starts, False, 0, False, factors)[0]
    return added


def _combine_some(y: Tensor, positions: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    """:func:`_combine` where only ``pairs``, ascending, have a row."""
    num_tokens, top_k = weights.shape
    factors = weights.flatten().index_select(0, pairs)
    tokens = pairs.div(top_k, rounding_mode="floor")
    if y.dtype == torch.float32 and y.device.type == "cpu" and len(pairs):
        counts = torch.bincount(tokens, minlength=num_tokens)
        starts = counts.cumsum(0) - counts
        return _sum_bags(y, positions, starts, factors)
    out = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    return out.index_add_(0, tokens, factors[:, None] * y.index_select(0, positions)).to(y.dtype)
