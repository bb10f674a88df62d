# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Pages of K and V to one contiguous run of tokens, decoded on the way where they are quantised.

For kernels that want rectangles of memory, as Hopper's copy engine does. Bytes: each of K and V
is read once and written once. In torch: ``cache[table].flatten(0, 1)[:context]`` a sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32


@triton.jit(
    do_not_specialize=("stride_table",),
    do_not_specialize_on_alignment=("table_ptr", "offsets_ptr", "context_ptr"),
)
def _gather_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, k_scale_ptr, v_scale_ptr, table_ptr, offsets_ptr,
    context_ptr, stride_block, stride_token, stride_kv_head, stride_scale, stride_scale_head,
    stride_table,
    HEADS: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    context = tl.load(context_ptr + seq)
    if tl.program_id(0) * TOKENS >= context:
        return
    ok = token < context
    block = tl.load(table_ptr + seq.to(tl.int64) * stride_table + token // PAGE, mask=ok, other=0)
    block = block.to(tl.int64)
    source = block * stride_block + (token % PAGE) * stride_token
    target = (tl.load(offsets_ptr + seq) + token).to(tl.int64) * (HEADS * D_PAD)
    d = tl.arange(0, D_PAD)
    head = tl.program_id(2)
    rows = (source + head * stride_kv_head)[:, None] + d[None, :]
    mask = ok[:, None] & (d < D)[None, :]
    k = tl.load(k_ptr + rows, mask=mask, other=0.0)
    v = tl.load(v_ptr + rows, mask=mask, other=0.0)
    if SCALED:
        at = block * stride_scale + head * stride_scale_head
        k = k.to(tl.float32) * tl.load(k_scale_ptr + at, mask=ok, other=0.0)[:, None]
        v = v.to(tl.float32) * tl.load(v_scale_ptr + at, mask=ok, other=0.0)[:, None]
    to = (target + head * D_PAD)[:, None] + d[None, :]
    tl.store(k_out_ptr + to, k.to(k_out_ptr.dtype.element_ty), mask=ok[:, None])
    tl.store(v_out_ptr + to, v.to(v_out_ptr.dtype.element_ty), mask=ok[:, None])


def gather_kv_triton(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    offsets: Tensor,
    max_context_len: int,
    k_out: Tensor,
    v_out: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Copies the pages of some sequences into ``k_out`` and ``v_out``.

    Args:
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], equal strides.
        block_tables, context_lens: int32 [S, max_blocks] and [S], as in BatchMetadata.
        offsets: int32 [S], the row of the outputs where each sequence's first token goes.
        max_context_len: largest entry of ``context_lens``.
        k_out, v_out: [tokens, num_kv_heads, d_pad] contiguous, ``d_pad`` a power of two; channels
            after ``head_dim`` become 0.
        k_scale, v_scale: float32 [num_blocks, num_kv_heads] of quantised pages.
    """
    page, heads, head_dim = k_cache.shape[1:]
    grid = (-(-max_context_len // _TOKENS), context_lens.shape[0], heads)
    _gather_kernel[grid](
        k_cache, v_cache, k_out, v_out, k_out if k_scale is None else k_scale,
        v_out if v_scale is None else v_scale, block_tables, offsets, context_lens,
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        *((0, 0) if k_scale is None else k_scale.stride()), block_tables.stride(0),
        HEADS=heads, PAGE=page, TOKENS=_TOKENS, D=head_dim, D_PAD=k_out.shape[-1],
        SCALED=k_scale is not None, num_warps=4,
    )  # fmt: skip
