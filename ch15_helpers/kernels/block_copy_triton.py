# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Copies KV blocks between a pool and a contiguous buffer in one launch, whatever the layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 4096


@triton.jit(do_not_specialize_on_alignment=("ids_ptr",))
def _copy_blocks_kernel(
    pages_ptr, ids_ptr, buffer_ptr, stride_block, stride_layer, stride_kv,
    RUN: tl.constexpr, RUNS: tl.constexpr, WORDS: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Program (part, run, block) copies ``WORDS`` words of K or V of one layer."""
    run, row = tl.program_id(1), tl.program_id(2)
    block = tl.load(ids_ptr + row).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    ok = word < RUN
    layer, kv = (run // 2).to(tl.int64), run % 2
    page = pages_ptr + block * stride_block + layer * stride_layer + kv * stride_kv
    flat = buffer_ptr + (row.to(tl.int64) * RUNS + run) * RUN
    if SCATTER:
        tl.store(page + word, tl.load(flat + word, mask=ok), mask=ok)
    else:
        tl.store(flat + word, tl.load(page + word, mask=ok), mask=ok)


def copy_blocks_triton(pages: Tensor, ids: Tensor, buffer: Tensor, *, scatter: bool) -> None:
    """See :mod:`ch15_helpers.kernels.block_copy`; the last three axes of a block are contiguous."""
    if len(ids) == 0:
        return
    # Whole words are copied as they are, so that no value is touched, NaN and FP8 included.
    wide = pages.shape[-1] * pages.element_size() % 4 == 0
    word = torch.int32 if wide else torch.uint8
    pages, buffer = pages.view(word), buffer.view(word)
    num_layers = pages.shape[1]
    run = pages[0, 0, 0].numel()
    # A grid's last two axes hold at most 65,535 programs each.
    step = 65_535
    for start in range(0, len(ids), step):
        part, out = ids[start : start + step], buffer[start : start + step]
        grid = (triton.cdiv(run, _WORDS), 2 * num_layers, len(part))
        _copy_blocks_kernel[grid](
            pages, part, out, pages.stride(0), pages.stride(1), pages.stride(2),
            RUN=run, RUNS=2 * num_layers, WORDS=_WORDS, SCATTER=scatter, num_warps=8,
        )  # fmt: skip
