# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gathers blocks into rows and takes their digests in the same pass over the bytes.

A digest costs nothing beside the copy: each word is read once, added to the other words of its
column of 16 lines, and only that sum is multiplied (see ``disagg.checksum``, whose definition this
follows). Programs leave partial sums, which are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 1024


@triton.jit
def _rows_kernel(
    pages_ptr, about_ptr, rows_ptr, partials_ptr, columns_ptr, groups_ptr, rest_ptr,
    block_stride, offset, row_words, row_stride, lines, num_groups, num_tiles,
    LINE: tl.constexpr, FOLD: tl.constexpr, GATHER: tl.constexpr, DIGEST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program for ``FOLD`` lines of a row, or for ``WIDTH`` of the words behind the lines."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    target = rows_ptr + row * row_stride
    source = target
    if GATHER:
        source = pages_ptr + tl.load(about_ptr + row * 3) * block_stride + offset
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.int64)
    if tile < num_groups:
        for fold in tl.static_range(FOLD):
            line = tile * FOLD + fold
            ok = (column < LINE) & (line < lines)
            values = tl.load(source + line * LINE + column, mask=ok, other=0)
            if GATHER:
                tl.store(target + line * LINE + column, values, mask=ok)
            total += values
        if DIGEST:
            weights = tl.load(columns_ptr + column, mask=column < LINE, other=0)
            total *= weights * tl.load(groups_ptr + tile)
    else:
        first = (tile - num_groups) * WIDTH
        word = lines * LINE + first + column
        ok = word < row_words
        total = tl.load(source + word, mask=ok, other=0)
        if GATHER:
            tl.store(target + word, total, mask=ok)
        if DIGEST:
            total *= tl.load(rest_ptr + first + column, mask=ok, other=0)
    if DIGEST:
        tl.store(partials_ptr + row * num_tiles + tile, tl.sum(total))


@triton.jit
def _mixed(state, word):
    """splitmix64 of ``state ^ word``, as in ``disagg.message``."""
    mixed = (state ^ word) + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return mixed ^ (mixed >> 31)


@triton.jit
def _tags_kernel(
    partials_ptr, about_ptr, tags_ptr, layers, heads, num_tiles,
    DIGEST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program for the tag of a row: its name, its digest, and a guard over these."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, WIDTH)
    digest = tl.zeros([], dtype=tl.int64)
    if DIGEST:
        sums = tl.load(partials_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0)
        digest = tl.sum(sums)
    sequence = tl.load(about_ptr + row * 3 + 1)
    index = tl.load(about_ptr + row * 3 + 2)
    layers = tl.zeros([], dtype=tl.int64) + layers
    heads = tl.zeros([], dtype=tl.int64) + heads
    state = tl.full([], 0xC4B15, dtype=tl.uint64)
    state = _mixed(state, sequence.to(tl.uint64, bitcast=True))
    state = _mixed(state, index.to(tl.uint64, bitcast=True))
    state = _mixed(state, layers.to(tl.uint64, bitcast=True))
    state = _mixed(state, heads.to(tl.uint64, bitcast=True))
    state = _mixed(state, digest.to(tl.uint64, bitcast=True))
    tag = tags_ptr + row * 6
    tl.store(tag, sequence)
    tl.store(tag + 1, index)
    tl.store(tag + 2, layers)
    tl.store(tag + 3, heads)
    tl.store(tag + 4, digest)
    tl.store(tag + 5, state.to(tl.int64, bitcast=True))


def rows_triton(
    rows: Tensor,
    weights: Sequence[Tensor],
    shape: tuple[int, int, int],
    *,
    pages: Tensor | None = None,
    about: Tensor | None = None,
    offset: int = 0,
    digest: bool = True,
) -> Tensor:
    """Partial digests, int64 [n, tiles], of int64 ``rows`` [n, words]; their sums are the digests.

    Args:
        weights: of columns, of groups of lines, and of the words after the last line.
        shape: (words of a line, lines that share a weight, lines of a row).
        pages: int64 [num_blocks, words of a block]; then rows are filled from there first.
        about: int64 [n, 3]: block, sequence and logical index of each row; with ``pages``.
        offset: word of a block where a row begins.
        digest: False only fills the rows.
    """
    (count, row_words), (line, fold, lines) = rows.shape, shape
    num_groups = triton.cdiv(lines, fold)
    num_tiles = num_groups + triton.cdiv(row_words - lines * line, _WIDTH)
    partials = torch.empty((count, num_tiles), dtype=torch.int64, device=rows.device)
    columns, groups, rest = weights
    _rows_kernel[(count, num_tiles)](
        rows if pages is None else pages, rows if about is None else about, rows, partials,
        columns, groups, rest,
        0 if pages is None else pages.stride(0), offset, row_words, rows.stride(0), lines,
        num_groups, num_tiles,
        LINE=line, FOLD=fold, GATHER=pages is not None, DIGEST=digest, WIDTH=_WIDTH, num_warps=8,
    )  # fmt: skip
    return partials


def tags_triton(
    tags: Tensor, partials: Tensor, about: Tensor, layers: int, heads: int, *, digest: bool
) -> None:
    """Fill int64 ``tags`` [n, 6] of rows; ``layers`` and ``heads`` as they stand in a tag."""
    count, num_tiles = partials.shape
    _tags_kernel[(count,)](
        partials, about, tags, layers, heads, num_tiles,
        DIGEST=digest, WIDTH=max(16, triton.next_power_of_2(num_tiles)), num_warps=4,
    )  # fmt: skip
