# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gathers blocks into rows, takes their digests in the same pass over the bytes, and scatters them.

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
ABOUT_WORDS = 5


_ANY = ["offset", "row_words", "lines", "num_groups", "num_tiles"]


@triton.jit(do_not_specialize=_ANY)  # or each part of a prompt would be compiled for
def _rows_kernel(
    pages_ptr, about_ptr, rows_ptr, partials_ptr, columns_ptr, groups_ptr, rest_ptr,
    block_stride, offset, row_words, row_stride, lines, num_groups, num_tiles,
    LINE: tl.constexpr, FOLD: tl.constexpr, MODE: tl.constexpr, DIGEST: tl.constexpr,
    EVEN: tl.constexpr, WIDTH: tl.constexpr, ABOUT: tl.constexpr,
):  # fmt: skip
    """One program for ``FOLD`` lines of a row, or for ``WIDTH`` of the words behind the lines.

    MODE 0 reads rows, 1 fills them from blocks, 2 fills blocks from them.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if EVEN:
        offset = tl.multiple_of(offset, 2)
    source = rows_ptr + row * row_stride
    target = source
    if MODE == 1:
        source = pages_ptr + tl.load(about_ptr + row * ABOUT) * block_stride + offset
    if MODE == 2:
        target = pages_ptr + tl.load(about_ptr + row * ABOUT) * block_stride + offset
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.int64)
    if tile < num_groups:
        for fold in tl.static_range(FOLD):
            line = tile * FOLD + fold
            ok = (column < LINE) & (line < lines)
            values = tl.load(source + line * LINE + column, mask=ok, other=0)
            if MODE > 0:
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
        if MODE > 0:
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


@triton.jit(do_not_specialize=["num_tiles"])
def _tags_kernel(
    partials_ptr, about_ptr, tags_ptr, num_tiles, DIGEST: tl.constexpr, ABOUT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program for the tag of a row: its name, its digest, and a guard over these."""
    row = tl.program_id(0).to(tl.int64)
    digest = tl.zeros([], dtype=tl.int64)
    if DIGEST:
        for first in range(0, num_tiles, WIDTH):
            tile = first + tl.arange(0, WIDTH)
            sums = tl.load(partials_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0)
            digest += tl.sum(sums)
    state = tl.full([], 0xC4B15, dtype=tl.uint64)
    tag = tags_ptr + row * 6
    for column in tl.static_range(4):
        word = tl.load(about_ptr + row * ABOUT + 1 + column)
        tl.store(tag + column, word)
        state = _mixed(state, word.to(tl.uint64, bitcast=True))
    tl.store(tag + 4, digest)
    state = _mixed(state, digest.to(tl.uint64, bitcast=True))
    tl.store(tag + 5, state.to(tl.int64, bitcast=True))


def rows_triton(
    rows: Tensor,
    weights: Sequence[Tensor],
    shape: tuple[int, int, int],
    *,
    mode: int = 0,
    pages: Tensor | None = None,
    about: Tensor | None = None,
    offset: int = 0,
    digest: bool = True,
) -> Tensor:
    """Partial digests, int64 [n, tiles], of int64 ``rows`` [n, words]; their sums are the digests.

    Args:
        weights: of columns, of groups of lines, and of the words after the last line.
        shape: (words of a line, lines that share a weight, lines of a row).
        mode: 0 only reads the rows; 1 fills them from blocks first; 2 fills the blocks from them.
        pages: int64 [num_blocks, words of a block], for modes 1 and 2.
        about: int64 [n, 5]: block, sequence, logical index, layers and heads of each row.
        offset: word of a block where a row begins.
        digest: False only copies.
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
        LINE=line, FOLD=fold, MODE=mode, DIGEST=digest, EVEN=offset % 2 == 0, WIDTH=_WIDTH,
        ABOUT=ABOUT_WORDS, num_warps=8,
    )  # fmt: skip
    return partials


def tags_triton(tags: Tensor, partials: Tensor, about: Tensor, *, digest: bool) -> None:
    """Fill int64 ``tags`` [n, 6] of rows; ``about`` and ``partials`` as above."""
    count, num_tiles = partials.shape
    _tags_kernel[(count,)](
        partials, about, tags, num_tiles, DIGEST=digest, ABOUT=ABOUT_WORDS, WIDTH=64, num_warps=2
    )
