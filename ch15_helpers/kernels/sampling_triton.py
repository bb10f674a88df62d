# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sampling on CUDA in one launch, without a sort.

Sorting 128k logits to find where top-p cuts them costs more than the model's last layer. The cut
is a logit, and it can be searched: a sweep over the row adds up the weights above four values
between the lowest and the highest candidate, which leaves a fifth of the interval, narrowed to
the logits in it (the search for a pivot in FlashInfer's sampling kernels, 2025, is a relative).
Five to nine sweeps find it. The k-th largest logit is found in the same way, by counts.

Weights are whole numbers, ``exp((logit - highest) / temperature) * 2**34``, held in float64, which
adds them without rounding as long as a row has at most 2**19 logits. Their sums do not depend on
the order of adding, so a row's token is the same whichever way the row is split and whatever else
is in the batch. A token 2**34 times less likely than the best is never drawn.

With few rows, several programs share a row and meet at a counter in memory after each sweep. All
of them run at once, since there are no more of them than multiprocessors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ch15_helpers.kernels.dispatch import num_processors
from ch15_helpers.kernels.sampling_search_triton import (
    find_cut,
    from_bits,
    load_tile,
    meet,
    seen,
    show,
    survey,
    to_bits,
    weigh,
)

_ROWS, _COLUMNS = 4, 2048  # of a tile: a thread holds 4 logits in each of 4 rows
_WARPS = 16
_MAX_SPLITS = 32
_SHARED = 8  # numbers that a program shows the others of its row at a time
_INF = tl.constexpr(float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _splitmix64(value):
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _pick(row_ptr, vocab, first, last, cut, highest, scale, draw, R: tl.constexpr,
          C: tl.constexpr):  # fmt: skip
    """First token whose cumulative weight from tile ``first`` on is larger than ``draw``."""
    tile = first
    tile_sum = draw * 0
    while (draw >= tile_sum) & (tile < last):
        draw -= tile_sum
        x, _ = load_tile(row_ptr, tile, vocab, R, C)
        tile_sum = tl.sum(tl.sum(tl.where(x >= cut, weigh(x, highest, scale), 0.0), 0), 0)
        tile += 1
    tile -= 1
    token = tile * (R * C) + tl.arange(0, R * C)
    x = tl.load(row_ptr + token, mask=token < vocab, other=-_INF).to(tl.float32)
    passed = tl.cumsum(tl.where(x >= cut, weigh(x, highest, scale), 0.0), 0) > draw
    return tl.min(tl.where(passed, token, 2147483647), 0)


@triton.jit
def _mass(row_ptr, vocab, first, last, cut, highest, scale, R: tl.constexpr, C: tl.constexpr):
    total = tl.zeros([C], tl.float64)
    for tile in range(first, last):
        x, _ = load_tile(row_ptr, tile, vocab, R, C)
        total += tl.sum(tl.where(x >= cut, weigh(x, highest, scale), 0.0), 0)
    return tl.sum(total, 0).to(tl.int64)


@triton.jit
def _survey_all(row_ptr, vocab, first, last, share_ptr, count_ptr, split,
                SPLITS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """:func:`survey` of the whole row, by all of its programs."""
    highest, best, lowest, bad = survey(row_ptr, vocab, first, last, R, C)
    if SPLITS > 1:
        show(share_ptr, 0, split, 0, to_bits(highest), SPLITS)
        show(share_ptr, 0, split, 1, best.to(tl.int64), SPLITS)
        show(share_ptr, 0, split, 2, to_bits(lowest), SPLITS)
        show(share_ptr, 0, split, 3, bad.to(tl.int64), SPLITS)
        meet(count_ptr, 0, SPLITS)
        all_highest = from_bits(seen(share_ptr, 0, 0, SPLITS))
        highest = tl.max(all_highest, 0)
        all_best = seen(share_ptr, 0, 1, SPLITS).to(tl.int32)
        best = tl.min(tl.where(all_highest == highest, all_best, 2147483647), 0)
        lowest = tl.min(from_bits(seen(share_ptr, 0, 2, SPLITS)), 0)
        bad = tl.sum(seen(share_ptr, 0, 3, SPLITS), 0).to(tl.int32)
    return highest, best, lowest, bad


@triton.jit
def _cut(row_ptr, vocab, first, last, share_ptr, count_ptr, split, lowest, highest, scale,
         top_k, top_p, SPLITS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Smallest logit that top-k and top-p keep, and the number of the next meeting."""
    cut, turn = lowest, 1
    if (top_k > 0) & (top_k < vocab):
        cut, turn = find_cut(
            row_ptr,
            vocab,
            first,
            last,
            share_ptr,
            count_ptr,
            turn,
            split,
            lowest,
            lowest,
            highest,
            top_k,
            top_p,
            highest,
            scale,
            False,
            SPLITS,
            R,
            C,
        )
    if top_p < 1:
        # Tokens below this logit weigh less together than what may be left out.
        margin = (1.02 * tl.log2((1 - top_p) / vocab) - 0.1).to(tl.float32) / scale
        lo = tl.minimum(tl.maximum(cut, highest + margin), highest)
        cut, turn = find_cut(
            row_ptr,
            vocab,
            first,
            last,
            share_ptr,
            count_ptr,
            turn,
            split,
            cut,
            lo,
            highest,
            top_k * 0 - 1,
            top_p,
            highest,
            scale,
            True,
            SPLITS,
            R,
            C,
        )
    return cut, turn


@triton.jit(do_not_specialize=["vocab"])
def _sample_kernel(
    logits_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, seeds_ptr, offsets_ptr, ids_ptr,
    share_ptr, count_ptr, vocab, stride,
    SPLITS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + row * stride
    share_ptr += row * (2 * SPLITS * 8)
    count_ptr += row
    tiles = tl.cdiv(vocab, R * C)
    first, last = tiles * split // SPLITS, tiles * (split + 1) // SPLITS
    highest, best, lowest, bad = _survey_all(
        row_ptr, vocab, first, last, share_ptr, count_ptr, split, SPLITS, R, C
    )
    finite = (bad == 0) & (highest > -_INF) & (highest < _INF)
    temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    if (temperature == 0) | (finite == 0):
        tl.store(ids_ptr + row, tl.where(finite, best, -1).to(tl.int64), mask=split == 0)
        return
    # Bounds keep 0 and infinity out of the products with 0 and infinity.
    scale = tl.minimum(tl.maximum(_LOG2_E / temperature, 1e-30), 1e30)
    top_k = tl.load(top_ks_ptr + row).to(tl.int64)
    top_p = tl.load(top_ps_ptr + row).to(tl.float64)
    cut, turn = _cut(row_ptr, vocab, first, last, share_ptr, count_ptr, split, lowest, highest,
                     scale, top_k, top_p, SPLITS, R, C)  # fmt: skip
    mass = _mass(row_ptr, vocab, first, last, cut, highest, scale, R, C)
    before, total = mass * 0, mass
    if SPLITS > 1:
        show(share_ptr, turn, split, 0, mass, SPLITS)
        meet(count_ptr, turn, SPLITS)
        masses = seen(share_ptr, turn, 0, SPLITS)
        before = tl.sum(tl.where(tl.arange(0, SPLITS) < split, masses, 0), 0)
        total = tl.sum(masses, 0)
    seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
    offset = tl.load(offsets_ptr + row).to(tl.uint64, bitcast=True)
    number = (_splitmix64(_splitmix64(seed) ^ offset) >> 11).to(tl.float64) * (1.0 / (1 << 53))
    draw = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
    if (draw >= before) & (draw < before + mass):
        draw -= before
        token = _pick(row_ptr, vocab, first, last, cut, highest, scale, draw.to(tl.float64), R, C)
        tl.store(ids_ptr + row, token.to(tl.int64))


def sample_tokens_triton(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    splits: int | None = None,
) -> Tensor:
    """See :func:`ch15_helpers.kernels.sampling.sample_tokens`.

    Args:
        splits: programs for each row, a power of two; chosen by the number of rows if None.
    """
    rows, vocab = logits.shape
    if splits is None:
        most = num_processors(logits.device) // rows if logits.is_cuda else 1
        most = max(1, min(most, triton.cdiv(vocab, _ROWS * _COLUMNS), _MAX_SPLITS))
        splits = 1 << (most.bit_length() - 1)
    ids = logits.new_empty(rows, dtype=torch.int64)
    share = logits.new_empty((rows, 2, splits, _SHARED), dtype=torch.int64)
    count = logits.new_zeros(rows, dtype=torch.int32)
    _sample_kernel[(rows, splits)](
        logits, temperatures, top_ks, top_ps, seeds, offsets, ids, share, count, vocab,
        logits.stride(0), SPLITS=splits, R=_ROWS, C=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return ids
