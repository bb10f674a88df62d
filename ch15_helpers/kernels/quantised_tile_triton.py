# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention over tiles of one-byte K and V: two neighbouring channels travel in one word.

Tensor cores take 16-bit operands, and the instructions that bring an operand from shared memory
into place move 16-bit words. So a tile is loaded as words of two channels, and is unpacked after
it arrived where the tensor core wants it: once into the even channels, once into the odd ones.
Scores are the sum of two products, and the output has two halves that are woven together last.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_pairs(cache_ptr, blocks, tokens, ok, stride_block, stride_token,
                PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """Words of two channels: int16 [tokens, D_PAD / 2]. Strides are in bytes."""
    rows = blocks.to(tl.int64) * (stride_block // 2) + (tokens % PAGE) * (stride_token // 2)
    d = tl.arange(0, D_PAD // 2)
    mask = ok[:, None] & (d < D // 2)[None, :]
    words = cache_ptr.to(tl.pointer_type(tl.int16)) + rows[:, None] + d[None, :]
    return tl.load(words, mask=mask, other=0)


# Two words of two one-byte channels in, two bfloat16 numbers out.
# E4M3 has 4 bits of exponent, bfloat16 has 8 with another bias: the bits in the right places are
# the right number times 2 ** -120, subnormal ones included.
_FP8_EVEN = tl.constexpr("""{ .reg .b32 a, b;
    shl.b32 a, $1, 8;  and.b32 a, a, 0x80008000;
    shl.b32 b, $1, 4;  lop3.b32 $0, b, 0x07f007f0, a, 0xea; }""")
_FP8_ODD = tl.constexpr("""{ .reg .b32 a, b;
    and.b32 a, $1, 0x80008000;
    shr.u32 b, $1, 4;  lop3.b32 $0, b, 0x07f007f0, a, 0xea; }""")
# bfloat16 has 7 bits after the point, so 128 plus the low 7 bits is exact, and so is minus 128
# or, where the sign bit is set, minus 256; that bit happens to turn 128 into 256.
_INT8_EVEN = tl.constexpr("""{ .reg .b32 a, b, c;
    mov.b32 c, 0xbf80bf80;
    lop3.b32 a, $1, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, $1, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, b, c, a; }""")
_INT8_ODD = tl.constexpr("""{ .reg .b32 a, b, c;
    mov.b32 c, 0xbf80bf80;  shr.u32 $0, $1, 8;
    lop3.b32 a, $0, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, $0, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, b, c, a; }""")


@triton.jit
def _unpack(pairs, dtype: tl.constexpr, FP8: tl.constexpr, EVEN: tl.constexpr):
    """The even or the odd channels; E4M3 in bfloat16 comes times 2 ** -120."""
    if dtype == tl.bfloat16:
        fp8: tl.constexpr = _FP8_EVEN if EVEN else _FP8_ODD
        int8: tl.constexpr = _INT8_EVEN if EVEN else _INT8_ODD
        code: tl.constexpr = fp8 if FP8 else int8
        values = tl.inline_asm_elementwise(code, "=r,r", [pairs], tl.bfloat16, True, 2)
    else:
        byte = (pairs & 0xFF if EVEN else (pairs >> 8) & 0xFF).to(tl.int32)
        if FP8:
            bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
            values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        else:
            # Faster than a conversion: the value plus 128 as the last bits of 2 ** 23.
            values = ((byte ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return values


@triton.jit
def run_quantised(q_rows_ptr, row_ok, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
                  first, last, context, position, scale_log2, stride_block, stride_token,
                  stride_scale, dtype: tl.constexpr, FP8: tl.constexpr, PAGE: tl.constexpr,
                  ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                  BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Softmax state of some rows over the keys ``first`` to ``last`` of one sequence.

    ``q_rows_ptr`` [ROWS] points at the rows of queries. Returns the maximum, the denominator and
    the weighted sum, as the loop over unquantised pages does.
    """
    d = tl.arange(0, D_PAD // 2)
    q_mask = row_ok[:, None] & (d < D // 2)[None, :]
    q_even = tl.load(q_rows_ptr[:, None] + 2 * d[None, :], mask=q_mask, other=0.0).to(dtype)
    q_odd = tl.load(q_rows_ptr[:, None] + 2 * d[None, :] + 1, mask=q_mask, other=0.0).to(dtype)
    # Powers of two change no digit. They keep products of numbers near 2 ** -120 in range.
    lift = 1.0
    if FP8 and dtype == tl.bfloat16:
        lift = 1152921504606846976.0
        q_even = (q_even.to(tl.float32) * lift).to(dtype)
        q_odd = (q_odd.to(tl.float32) * lift).to(dtype)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    denom = tl.zeros([ROWS], tl.float32)
    acc_even = tl.zeros([ROWS, D_PAD // 2], tl.float32)
    acc_odd = tl.zeros([ROWS, D_PAD // 2], tl.float32)
    tokens = first + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + tokens // PAGE, mask=tokens < context, other=0)
    for _ in range(first, last, BLOCK_N):
        following = tokens + BLOCK_N
        next_blocks = tl.load(table_ptr + following // PAGE, mask=following < context, other=0)
        ok = tokens < context
        k = _load_pairs(k_ptr, blocks, tokens, ok, stride_block, stride_token, PAGE, D, D_PAD)
        v = _load_pairs(v_ptr, blocks, tokens, ok, stride_block, stride_token, PAGE, D, D_PAD)
        at = blocks.to(tl.int64) * stride_scale
        k_factor = tl.load(k_scale_ptr + at, mask=ok, other=0.0) * (scale_log2 * lift)
        v_factor = tl.load(v_scale_ptr + at, mask=ok, other=0.0) * lift
        k_even, k_odd = _unpack(k, dtype, FP8, True), _unpack(k, dtype, FP8, False)
        s = tl.dot(q_even, tl.trans(k_even), input_precision=PRECISION)
        s = tl.dot(q_odd, tl.trans(k_odd), s, input_precision=PRECISION) * k_factor[None, :]
        s = tl.where(tokens[None, :] <= position[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.sum(p, 1)
        p = (p * v_factor[None, :]).to(dtype)
        v_even, v_odd = _unpack(v, dtype, FP8, True), _unpack(v, dtype, FP8, False)
        acc_even = tl.dot(p, v_even, acc_even * alpha[:, None], input_precision=PRECISION)
        acc_odd = tl.dot(p, v_odd, acc_odd * alpha[:, None], input_precision=PRECISION)
        m = m_new
        tokens = following
        blocks = next_blocks
    return m, denom, tl.interleave(acc_even, acc_odd) * lift
