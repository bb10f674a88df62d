# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The search for the last logit that top-k or top-p keeps: see ``sampling_triton``.

A row's programs go through it together. Each looks at its tiles, shows its sums to the others in
memory, and waits for theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_ONE = tl.constexpr(float(1 << 34))


@triton.jit
def load_tile(row_ptr, tile, vocab, R: tl.constexpr, C: tl.constexpr):
    """Tile [R, C] of a row as float32, and the tokens' ids."""
    token = tile * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.load(row_ptr + token, mask=token < vocab, other=-_INF).to(tl.float32), token


@triton.jit
def weigh(x, highest, scale):
    return tl.floor(tl.exp2((x - highest) * scale) * _ONE).to(tl.float64)


@triton.jit
def _up(x):
    """The next larger float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0, 1, bits + tl.where(x > 0, 1, -1))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def show(share_ptr, turn, split, i: tl.constexpr, value, SPLITS: tl.constexpr):
    # The numbers of the turn before may still be read: two sets take turns.
    tl.store(share_ptr + (turn % 2 * SPLITS + split) * 8 + i, value)


@triton.jit
def meet(count_ptr, turn, SPLITS: tl.constexpr):
    """Waits for the other programs of the row: what they showed before can then be seen."""
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="acq_rel")
    while tl.atomic_add(count_ptr, 0, sem="acquire") < (turn + 1) * SPLITS:
        pass
    tl.debug_barrier()


@triton.jit
def seen(share_ptr, turn, i: tl.constexpr, SPLITS: tl.constexpr):
    """Value ``i`` of all programs of the row, int64 [SPLITS]."""
    share_ptr += (turn % 2 * SPLITS + tl.arange(0, SPLITS)) * 8 + i
    return tl.load(share_ptr, volatile=True)


@triton.jit
def to_bits(x):
    return x.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def from_bits(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def survey(row_ptr, vocab, first, last, R: tl.constexpr, C: tl.constexpr):
    """Largest logit, its first token, the smallest finite logit, and how many are NaN."""
    best = tl.full([R, C], -_INF, tl.float32)
    token_of_best = tl.full([R, C], 2147483647, tl.int32)
    smallest = tl.full([R, C], _INF, tl.float32)
    bad = tl.zeros([R, C], tl.int32)
    for tile in range(first, last):
        x, token = load_tile(row_ptr, tile, vocab, R, C)
        token_of_best = tl.where(x > best, token, token_of_best)
        best = tl.where(x > best, x, best)
        smallest = tl.where((x > -_INF) & (x < smallest), x, smallest)
        bad += (x != x).to(tl.int32)
    highest = tl.max(tl.max(best, 0), 0)
    token_of_best = tl.where(best == highest, token_of_best, 2147483647)
    lowest = tl.min(tl.min(smallest, 0), 0)
    return highest, tl.min(tl.min(token_of_best, 0), 0), lowest, tl.sum(tl.sum(bad, 0), 0)


@triton.jit
def _whole(sums):
    return tl.sum(sums, 0).to(tl.int64)


@triton.jit
def _sweep(row_ptr, vocab, first, last, floor, lo, hi, e1, e2, e3, e4, highest, scale,
           MASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Sums of weights (else counts) of logits from ``floor`` on, and from each edge to ``hi``.

    Also the smallest and the largest logit from ``lo`` to ``hi``.
    """
    s0 = tl.zeros([C], tl.float64 if MASS else tl.int32)
    s1 = tl.zeros([C], tl.float64 if MASS else tl.int32)
    s2 = tl.zeros([C], tl.float64 if MASS else tl.int32)
    s3 = tl.zeros([C], tl.float64 if MASS else tl.int32)
    s4 = tl.zeros([C], tl.float64 if MASS else tl.int32)
    low = tl.full([C], _INF, tl.float32)
    top = tl.full([C], -_INF, tl.float32)
    for tile in range(first, last):
        x, _ = load_tile(row_ptr, tile, vocab, R, C)
        if MASS:
            weight = weigh(x, highest, scale)
        else:
            weight = tl.full([R, C], 1, tl.int32)
        s0 += tl.sum(tl.where(x >= floor, weight, 0), 0)
        x = tl.where(x <= hi, x, -_INF)
        s1 += tl.sum(tl.where(x >= e1, weight, 0), 0)
        s2 += tl.sum(tl.where(x >= e2, weight, 0), 0)
        s3 += tl.sum(tl.where(x >= e3, weight, 0), 0)
        s4 += tl.sum(tl.where(x >= e4, weight, 0), 0)
        low = tl.minimum(low, tl.min(tl.where(x >= lo, x, _INF), 0))
        top = tl.maximum(top, tl.max(x, 0))
    s0, s1, s2 = _whole(s0), _whole(s1), _whole(s2)
    return s0, s1, s2, _whole(s3), _whole(s4), tl.min(low, 0), tl.max(top, 0)


@triton.jit
def _edge(lo, hi, part):
    """A value above ``lo`` and at most ``hi``, so that each sweep shrinks the interval."""
    return tl.minimum(tl.maximum(lo * (1 - part) + hi * part, _up(lo)), hi)


@triton.jit
def find_cut(row_ptr, vocab, first, last, share_ptr, count_ptr, turn, split, floor, lo, hi, wanted,
          share, highest, scale, MASS: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
          C: tl.constexpr):  # fmt: skip
    """Largest logit v for which those from v on weigh (number) at least ``wanted``.

    ``MASS``: the first sweep finds out what is wanted: ``share`` of the weight from ``floor`` on.
    """
    above = wanted * 0  # of all logits larger than the interval's
    while lo < hi:
        e1, e2 = _edge(lo, hi, 0.2), _edge(lo, hi, 0.4)
        e3, e4 = _edge(lo, hi, 0.6), _edge(lo, hi, 0.8)
        s0, s1, s2, s3, s4, low, top = _sweep(
            row_ptr, vocab, first, last, floor, lo, hi, e1, e2, e3, e4, highest, scale, MASS, R, C
        )
        if SPLITS > 1:
            show(share_ptr, turn, split, 0, s0, SPLITS)
            show(share_ptr, turn, split, 1, s1, SPLITS)
            show(share_ptr, turn, split, 2, s2, SPLITS)
            show(share_ptr, turn, split, 3, s3, SPLITS)
            show(share_ptr, turn, split, 4, s4, SPLITS)
            show(share_ptr, turn, split, 5, to_bits(low), SPLITS)
            show(share_ptr, turn, split, 6, to_bits(top), SPLITS)
            meet(count_ptr, turn, SPLITS)
            s0 = tl.sum(seen(share_ptr, turn, 0, SPLITS), 0)
            s1 = tl.sum(seen(share_ptr, turn, 1, SPLITS), 0)
            s2 = tl.sum(seen(share_ptr, turn, 2, SPLITS), 0)
            s3 = tl.sum(seen(share_ptr, turn, 3, SPLITS), 0)
            s4 = tl.sum(seen(share_ptr, turn, 4, SPLITS), 0)
            low = tl.min(from_bits(seen(share_ptr, turn, 5, SPLITS)), 0)
            top = tl.max(from_bits(seen(share_ptr, turn, 6, SPLITS)), 0)
            turn += 1
        if MASS:
            wanted = tl.where(wanted < 0, tl.ceil(share * s0.to(tl.float64)).to(tl.int64), wanted)
        short = wanted - above
        in4, in3, in2, in1 = s4 >= short, s3 >= short, s2 >= short, s1 >= short
        edge = tl.where(in4, e4, tl.where(in3, e3, tl.where(in2, e2, tl.where(in1, e1, lo))))
        end = tl.where(in4, hi, tl.where(in3, e4, tl.where(in2, e3, tl.where(in1, e2, e1))))
        over = tl.where(in4, 0, tl.where(in3, s4, tl.where(in2, s3, tl.where(in1, s2, s1))))
        above += over
        # The interval ends below ``end``, at its largest logit.
        hi = tl.where(in4, tl.minimum(hi, top), tl.minimum(-_up(-end), top))
        lo = tl.maximum(edge, low)
    return lo, turn
