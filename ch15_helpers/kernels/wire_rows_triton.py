# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Expert parallelism's bookkeeping on a GPU: one launch each to choose, pack and unpack copies.

Torch needs some thirty small operations for what happens here, and at a few tokens their launches
take longer than the transfer. The torch versions are ``moe.dispatch.make_copies`` and
``moe.wire.WireFormat``, which tests hold these against.

Bytes: packing reads a token once for each copy and writes the copy; unpacking reads and writes
rows only where they are FP8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 64  # of one program of the first kernel
_VARYING = ("num_tokens", "num_rows", "fixed_rows")


@triton.jit(do_not_specialize=_VARYING)
def _choose_kernel(
    slots_ptr, homes_ptr, counts_ptr, num_tokens, fixed_rows, size,
    D: tl.constexpr, TOP_K: tl.constexpr, DEDUP: tl.constexpr, FIXED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = token < num_tokens
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + j, mask=present, other=-1).to(tl.int32)
        home = tl.where(slot < 0, -1, slot // size)
        if DEDUP:
            for i in tl.static_range(j):
                other = tl.load(slots_ptr + token * TOP_K + i, mask=present, other=-1)
                other = other.to(tl.int32)
                repeated = (other >= 0) & (other // size == home)
                home = tl.where(repeated, -1, home)
        if FIXED:  # a token has the same row of every message
            home = tl.where(home < 0, -1, home * fixed_rows + token)
        else:
            tl.atomic_add(counts_ptr + home, 1, mask=present & (home >= 0))
        tl.store(homes_ptr + token * TOP_K + j, home, mask=present)


def choose_homes_triton(
    slots: Tensor, slots_per_destination: int, num_destinations: int, dedup: bool
) -> tuple[Tensor, Tensor]:
    """Destination of each pair, int32 [num_tokens, k], and copies for each, int64 [destinations].

    A pair has -1 where it goes nowhere or, with ``dedup``, where an earlier one goes there, too.
    """
    homes = torch.empty_like(slots, dtype=torch.int32)
    counts = slots.new_zeros(num_destinations, dtype=torch.int64)
    _choose(slots, homes, counts, 0, slots_per_destination, dedup, False)
    return homes, counts


def place_fixed_triton(slots: Tensor, slots_per_destination: int, fixed_rows: int) -> Tensor:
    """Row of each pair's copy, int32 [num_tokens, k], where messages have ``fixed_rows`` rows.

    Token t has row t of each message; -1 where an earlier pair goes there, or it goes nowhere.
    """
    positions = torch.empty_like(slots, dtype=torch.int32)
    _choose(slots, positions, positions, fixed_rows, slots_per_destination, True, True)
    return positions


def _choose(
    slots: Tensor, homes: Tensor, counts: Tensor, rows: int, size: int, dedup: bool, fixed: bool
) -> None:
    num_tokens, top_k = slots.shape
    if num_tokens:
        _choose_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
            slots, homes, counts, num_tokens, rows, size, counts.numel() if not fixed else 1,
            top_k, dedup, fixed, _TOKENS, num_warps=2,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _pack_kernel(
    x_ptr, payload_ptr, scales_ptr, ids_ptr, factors_ptr, slots_ptr, weights_ptr, pairs_ptr,
    homes_ptr, num_tokens, fixed_rows, size, stride_x, stride_payload, stride_words, hidden,
    TOP_K: tl.constexpr, ENTRIES: tl.constexpr, K_PAD: tl.constexpr, FIXED: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, K_PAD)
    mask = choice < ENTRIES
    if FIXED:
        home = row // fixed_rows
        token = row - home * fixed_rows
        mask = mask & (token < num_tokens)
        source = tl.maximum(tl.minimum(token, num_tokens - 1), 0)  # padding is anybody
        pair = source * TOP_K
    else:
        pair = tl.load(pairs_ptr + row).to(tl.int64)
        source = pair // TOP_K
        home = tl.load(homes_ptr + pair).to(tl.int64)
    first = source * TOP_K if ENTRIES == TOP_K else pair
    slot = tl.load(slots_ptr + first + choice, mask=mask, other=-1).to(tl.int64) - home * size
    slot = tl.where((slot >= 0) & (slot < size), slot, -1)
    weight = tl.load(weights_ptr + first + choice, mask=mask, other=0.0)
    tl.store(ids_ptr + row * stride_words + choice, slot.to(tl.int32), mask=choice < ENTRIES)
    tl.store(factors_ptr + row * stride_words + choice, weight, mask=choice < ENTRIES)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = column < hidden
        values = tl.load(x_ptr + source * stride_x + column, mask=here, other=0.0)
        out = payload_ptr + row * stride_payload + column
        if SCALE:
            blocks = tl.reshape(values.to(tl.float32), (BLOCK // SCALE, SCALE))
            # A NaN must not get lost in the maximum.
            broken = tl.max(tl.where(tl.abs(blocks) < float("inf"), 0, 1), 1)
            largest = tl.max(tl.where(blocks == blocks, tl.abs(blocks), 0.0), 1)
            # The power of two from which on nothing exceeds 448: 448 is 1.75 times 2**8.
            bits = largest.to(tl.int32, bitcast=True)
            exponent = (bits >> 23) - 127 - 8 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
            exponent = tl.minimum(tl.maximum(exponent, -120), 120)
            exponent = tl.where(largest == 0.0, 0, exponent)
            scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
            scale = tl.where(broken == 1, float("nan"), scale)
            inverse = tl.where(broken == 1, float("nan"), inverse)
            group = start // SCALE + tl.arange(0, BLOCK // SCALE)
            tl.store(scales_ptr + row * stride_words + group, scale, mask=group * SCALE < hidden)
            scaled = tl.reshape(blocks * inverse[:, None], (BLOCK,))
            tl.store(out, scaled.to(payload_ptr.dtype.element_ty), mask=here)
        else:
            tl.store(out, values.to(payload_ptr.dtype.element_ty), mask=here)


def pack_rows_triton(
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    slots: Tensor,
    weights: Tensor,
    order: tuple[Tensor, Tensor] | int,
    slots_per_destination: int,
    block: int,
) -> None:
    """Writes all copies: hidden states, scales, slots at the destination, weights.

    Args:
        x: [num_tokens, hidden], at least one row.
        parts: views of the wire, rows first: payload, scales (of no column unless FP8), ids int32
            and weights float32 [rows, entries].
        slots, weights: of the batch, [num_tokens, k].
        order: the pair of each row and the destination of each pair; or, where messages have a
            fixed number of rows, that number.
        block: numbers that share a scale.
    """
    payload, scales, ids, factors = parts
    (num_tokens, top_k), hidden, fixed = slots.shape, x.shape[1], isinstance(order, int)
    pairs, homes = (ids, ids) if isinstance(order, int) else order
    width = max(block, min(4096, triton.next_power_of_2(hidden)))
    if len(ids):
        _pack_kernel[(len(ids),)](
            x, payload, scales, ids, factors, slots, weights, pairs, homes, num_tokens,
            order if fixed else 0, slots_per_destination, x.stride(0), payload.stride(0),
            ids.stride(0), hidden, top_k, ids.shape[1], triton.next_power_of_2(ids.shape[1]),
            fixed, block if scales.shape[1] else 0, width, num_warps=8 if width > 1024 else 4,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _unpack_kernel(
    payload_ptr, scales_ptr, ids_ptr, factors_ptr, rows_ptr, slots_ptr, weights_ptr,
    stride_payload, stride_words, hidden,
    ENTRIES: tl.constexpr, K_PAD: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, K_PAD)
    mask = choice < ENTRIES
    slot = tl.load(ids_ptr + row * stride_words + choice, mask=mask)
    weight = tl.load(factors_ptr + row * stride_words + choice, mask=mask)
    tl.store(slots_ptr + row * ENTRIES + choice, slot, mask=mask)
    tl.store(weights_ptr + row * ENTRIES + choice, weight, mask=mask)
    if SCALE:
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = column < hidden
            value = tl.load(payload_ptr + row * stride_payload + column, mask=here, other=0.0)
            scale = tl.load(scales_ptr + row * stride_words + column // SCALE, mask=here)
            value = value.to(tl.float32) * scale
            tl.store(rows_ptr + row * hidden + column, value.to(rows_ptr.dtype.element_ty),
                     mask=here)  # fmt: skip


def unpack_rows_triton(
    parts: tuple[Tensor, Tensor, Tensor, Tensor], block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [R, hidden] in ``dtype``, slots int32 and weights float32 [R, entries].

    Hidden states stay where they are unless they are FP8.
    """
    payload, scales, ids, factors = parts
    scaled = scales.shape[1] > 0
    rows = payload.new_empty(payload.shape, dtype=dtype) if scaled else payload.to(dtype)
    slots = torch.empty_like(ids, memory_format=torch.contiguous_format)
    weights = torch.empty_like(factors, memory_format=torch.contiguous_format)
    hidden, entries = payload.shape[1], ids.shape[1]
    if len(ids):
        _unpack_kernel[(len(ids),)](
            payload, scales, ids, factors, rows, slots, weights, payload.stride(0), ids.stride(0),
            hidden, entries, triton.next_power_of_2(entries), block if scaled else 0,
            min(4096, triton.next_power_of_2(hidden)),
        )  # fmt: skip
    return rows, slots, weights
