# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton attention kernels share: loading a tile of pages, one step of online softmax
(Milakov and Gimelshein, 2018), and joining partial softmaxes.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
# Values and alignments that change from step to step: a kernel compiled anew in the middle of
# serving would stall every request in the batch for about a second.
VARYING = ("num_seqs", "stride_table", "num_units")
METADATA = ("table_ptr", "starts_ptr", "context_ptr", "arrivals_ptr", "part_ml_ptr")
MIN_SEQS = 64


@triton.jit
def load_tile(cache_ptr, blocks, tokens, ok, stride_block, stride_token, dtype: tl.constexpr,
          PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """Rows ``tokens`` of one KV head, whose pages are ``blocks``, as ``dtype``."""
    rows = blocks.to(tl.int64) * stride_block + (tokens % PAGE) * stride_token
    d = tl.arange(0, D_PAD)
    mask = ok[:, None] & (d < D)[None, :]
    return tl.load(cache_ptr + rows[:, None] + d[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def attend(q, k, v, visible, scale_log2, v_factor, m, denom, acc, PRECISION: tl.constexpr):
    """One tile of online softmax in base two.

    ``visible`` masks keys that a row must not see; ``scale_log2`` and ``v_factor`` are scalars or
    one factor a key, which is how the scales of quantised K and V come in.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen no key yet keeps -inf; subtracting it from itself would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    denom = denom * alpha + tl.sum(p, 1)
    p = (p * v_factor).to(v.dtype)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, denom, acc


@triton.jit
def _load_part(part_acc_ptr, part_ml_ptr, part, ok, d, D_PAD: tl.constexpr):
    # Other processors wrote these: the first-level cache must not answer.
    m = tl.load(part_ml_ptr + part * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
    denom = tl.load(part_ml_ptr + part * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
    acc = tl.load(part_acc_ptr + part[:, None] * D_PAD + d[None, :], mask=ok[:, None], other=0.0,
                  cache_modifier=".cg")  # fmt: skip
    return m, denom, acc


@triton.jit
def _join(m, denom, acc, m_part, denom_part, acc_part):
    """The softmax over two sets of keys from the softmaxes over each."""
    m_new = tl.maximum(m, m_part)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha, beta = tl.exp2(m - m_safe), tl.exp2(m_part - m_safe)
    return m_new, denom * alpha + denom_part * beta, acc * alpha[:, None] + acc_part * beta[:, None]


@triton.jit
def merge_parts(part_acc_ptr, part_ml_ptr, first_part, num_parts, stride_part, row_ok,
           ROWS: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """Joins the partial softmaxes of one sequence and KV head, four loads at a time."""
    rows = first_part + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    denom = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for index in range(0, num_parts, 4):
        part = rows + index * stride_part
        m0, denom0, acc0 = _load_part(part_acc_ptr, part_ml_ptr, part, row_ok, d, D_PAD)
        ok1 = row_ok & (index + 1 < num_parts)
        m1, denom1, acc1 = _load_part(part_acc_ptr, part_ml_ptr, part + stride_part, ok1, d, D_PAD)
        ok2 = row_ok & (index + 2 < num_parts)
        m2, denom2, acc2 = _load_part(part_acc_ptr, part_ml_ptr, part + 2 * stride_part, ok2, d,
                                      D_PAD)  # fmt: skip
        ok3 = row_ok & (index + 3 < num_parts)
        m3, denom3, acc3 = _load_part(part_acc_ptr, part_ml_ptr, part + 3 * stride_part, ok3, d,
                                      D_PAD)  # fmt: skip
        m0, denom0, acc0 = _join(m0, denom0, acc0, m1, denom1, acc1)
        m2, denom2, acc2 = _join(m2, denom2, acc2, m3, denom3, acc3)
        m0, denom0, acc0 = _join(m0, denom0, acc0, m2, denom2, acc2)
        m, denom, acc = _join(m, denom, acc, m0, denom0, acc0)
    return denom, acc
