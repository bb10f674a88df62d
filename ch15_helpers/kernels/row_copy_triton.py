# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Copies numbered rows in one launch; either side may be a peer's memory, over the link."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_BYTES = 32 << 10


@triton.jit
def _copy_rows_kernel(
    source_ptr, target_ptr, ids_ptr, num_rows, num_words, source_stride, target_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    """Programs take tiles of ``TILE`` words in turn: all loads of a tile are under way at once,
    which is what hides the latency of a link."""
    parts = tl.cdiv(num_words, TILE)
    for tile in range(tl.program_id(0), num_rows * parts, tl.num_programs(0)):
        row, part = tile // parts, tile % parts
        start = tl.load(ids_ptr + row).to(tl.int64) * source_stride
        stop = tl.load(ids_ptr + num_rows + row).to(tl.int64) * target_stride
        word = part * TILE + tl.arange(0, TILE)
        ok = word < num_words
        values = tl.load(source_ptr + start + word, mask=ok)
        tl.store(target_ptr + stop + word, values, mask=ok)


def copy_rows_triton(source: Tensor, target: Tensor, ids: Tensor, *, programs: int) -> None:
    """See :mod:`ch15_helpers.kernels.row_copy`; ids int32 [2, n]; on the current device."""
    count = ids.shape[1]
    if count == 0:
        return
    sizes = [source.data_ptr(), target.data_ptr(), source.shape[1]]
    sizes += [source.stride(0), target.stride(0)]
    words = (torch.int64, torch.int32, torch.uint8)
    word = next(w for w in words if all(size % w.itemsize == 0 for size in sizes))
    source, target = source.view(word), target.view(word)
    tile = _TILE_BYTES // word.itemsize // (1 if word.itemsize > 1 else 4)
    work = count * triton.cdiv(source.shape[1], tile)
    _copy_rows_kernel[(min(programs, work),)](
        source, target, ids, count, source.shape[1], source.stride(0), target.stride(0),
        TILE=tile, num_warps=8,
    )  # fmt: skip
