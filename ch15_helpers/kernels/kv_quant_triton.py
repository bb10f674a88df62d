# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Writes one-byte keys and values into their blocks in one launch, scales included.

A step's tokens of one block are neighbours in the flat batch. The program of the first of them
owns the block, for one head: it finds the new scale, encodes what the block held again if the
scale grew, and encodes the new tokens. Nothing depends on the host, so the launch can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scale_for(largest, LIMIT_EXPONENT: tl.constexpr, LIMIT_MANTISSA: tl.constexpr):
    """Smallest power of two s with s * limit >= largest; see kv_quant.scale_for."""
    bits = largest.to(tl.int32, bitcast=True)
    field = ((bits + (0x7FFFFF - LIMIT_MANTISSA)) >> 23) - LIMIT_EXPONENT
    field = tl.where(largest > 0, tl.maximum(field, 1), 0)
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, LIMIT: tl.constexpr, IS_INT8: tl.constexpr, dtype: tl.constexpr):
    """Rounded to nearest, ties to even, and clamped; NaN becomes 0."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    if IS_INT8:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: adding it rounds to whole numbers
    return x.to(dtype)


@triton.jit
def _write_head(
    cache_ptr, scale_ptr, x_ptr, stride_slot, stride_token, first, mine, old, rows, mask,
    LIMIT: tl.constexpr, LIMIT_EXPONENT: tl.constexpr, LIMIT_MANTISSA: tl.constexpr,
    IS_INT8: tl.constexpr, PAGE_PAD: tl.constexpr,
):  # fmt: skip
    """One head of one block; ``rows`` [PAGE_PAD, D] counts slots, ``first`` is the first new."""
    d = tl.arange(0, rows.shape[1])[None, :]
    slot = tl.arange(0, PAGE_PAD)[:, None]
    new = mask & mine[:, None]
    x = tl.load(x_ptr + (slot - first) * stride_token + d, mask=new, other=0.0).to(tl.float32)
    finite = tl.abs(x) <= 3.4028234663852886e38
    largest = tl.max(tl.where(finite, tl.abs(x), 0.0))
    needed = _scale_for(largest, LIMIT_EXPONENT, LIMIT_MANTISSA)
    needed = tl.where(tl.min(finite.to(tl.int32)) == 0, float("nan"), needed)
    held = tl.load(scale_ptr)
    held = tl.where(first > 0, held, 0.0)
    grown = tl.maximum(held, needed, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.where(grown == 0, 0.0, 1.0 / grown)
    target = cache_ptr + slot * stride_slot + d
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if grown != held and held != 0:
        kept = mask & old[:, None]
        before = tl.load(target, mask=kept).to(tl.float32)  # others are not stored
        again = _encode(before * (held * inverse), LIMIT, IS_INT8, dtype)
        tl.store(target, again, mask=kept)
    tl.store(target, _encode(x * inverse, LIMIT, IS_INT8, dtype), mask=new)
    tl.store(scale_ptr, grown)


@triton.jit(do_not_specialize=("num_tokens",), do_not_specialize_on_alignment=("slots_ptr",))
def _write_kernel(
    k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, k_ptr, v_ptr, slots_ptr, num_tokens,
    stride_block, stride_slot, stride_head, stride_scale_block, stride_scale_head,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    LIMIT: tl.constexpr, LIMIT_EXPONENT: tl.constexpr, LIMIT_MANTISSA: tl.constexpr,
    IS_INT8: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    block, first = slot // PAGE, slot % PAGE
    before = tl.load(slots_ptr + token - 1, mask=token > 0, other=-1)
    if before >= 0 and before // PAGE == block:
        return  # the program of the run's first token writes this one too
    at = tl.arange(0, PAGE_PAD)
    row = token + at - first
    inside = (at >= first) & (at < PAGE) & (row < num_tokens)
    theirs = tl.load(slots_ptr + row, mask=inside, other=-1)
    mine = inside & (theirs == block * PAGE + at)
    old = at < first
    d = tl.arange(0, D_PAD)
    mask = (at < PAGE)[:, None] & (d < D)[None, :]
    rows = at[:, None] + tl.zeros([1, D_PAD], tl.int32)
    target = block * stride_block + head * stride_head
    scale = block * stride_scale_block + head * stride_scale_head
    _write_head(k_cache_ptr + target, k_scale_ptr + scale,
                k_ptr + token * stride_k_token + head * stride_k_head,
                stride_slot, stride_k_token, first, mine, old, rows, mask,
                LIMIT, LIMIT_EXPONENT, LIMIT_MANTISSA, IS_INT8, PAGE_PAD)  # fmt: skip
    _write_head(v_cache_ptr + target, v_scale_ptr + scale,
                v_ptr + token * stride_v_token + head * stride_v_head,
                stride_slot, stride_v_token, first, mine, old, rows, mask,
                LIMIT, LIMIT_EXPONENT, LIMIT_MANTISSA, IS_INT8, PAGE_PAD)  # fmt: skip


def write_kv_quantised_triton(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    limit: tuple[float, int, int],
) -> None:
    """See :func:`ch15_helpers.kernels.kv_quant.write_kv_quantised`.

    Last axes contiguous; K and V, pages and scales, with equal strides. ``limit``: the largest
    stored magnitude, the exponent of its power of two, its mantissa bits.
    """
    num_tokens, heads, head_dim = k.shape
    page = k_cache.shape[1]
    _write_kernel[(num_tokens, heads)](
        k_cache, v_cache, k_scale, v_scale, k, v, slot_mapping, num_tokens,
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), *k_scale.stride(),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        LIMIT=limit[0], LIMIT_EXPONENT=limit[1], LIMIT_MANTISSA=limit[2],
        IS_INT8=k_cache.element_size() == 1 and not k_cache.is_floating_point(),
        PAGE=page, PAGE_PAD=triton.next_power_of_2(page), D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
