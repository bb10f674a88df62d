# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What feeds the grouped product of ``fused_moe_triton_hopper``: its work items and its copies.

Programs claim items, a tile of rows times a block of columns, from a counter. The warps that copy
claim them, and post each to the warps that multiply.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma


@gluon.jit
def next_item(items, item_free, item_posted, turn):
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(item_posted.index(turn & 1), turn >> 1 & 1)
    item = gl.max(items.index(turn & 1).load(LANES), 0)
    mbarrier.arrive(item_free.index(turn & 1))
    return item


@gluon.jit
def locate(item, num_tiles, columns, tiles_ptr, GROUP: gl.constexpr, TALL_FIRST: gl.constexpr):
    """Item to (expert, first row, valid rows, column), a group of tiles for each column."""
    group = item // (GROUP * columns)
    first = group * GROUP
    size = min(num_tiles - first, GROUP)
    within = item - group * GROUP * columns
    tile = first + within % size
    if TALL_FIRST:
        tile = gl.load(tiles_ptr + tile * 4 + 3)
    tile_ptr = tiles_ptr + tile * 4
    return gl.load(tile_ptr), gl.load(tile_ptr + 1), gl.load(tile_ptr + 2), within // size


@gluon.jit
def _post(items, item_free, item_posted, item, turn):
    """Tells the multiplying warps their item number ``turn``, two ahead at most."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(item_free.index(turn & 1), (turn >> 1 & 1) ^ 1)
    items.index(turn & 1).store(gl.full([32], item, gl.int32, LANES))
    mbarrier.arrive(item_posted.index(turn & 1))


@gluon.jit
def _token_rows(a, row, wanted, ROWS: gl.constexpr, TOP_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the tokens of sorted rows ``row`` onward begin, and which rows are no padding."""
    a_ptr, rows_ptr, num_pairs, stride = a
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    pair = gl.load(rows_ptr + row + lane, mask=wanted & (lane >= 0), other=num_pairs)
    return a_ptr + (pair // TOP_K).to(gl.int64) * stride, pair < num_pairs


@gluon.jit
def _gather_rows(buffer, row_ptr, real, column):
    async_copy.async_copy_global_to_shared(
        buffer, row_ptr[:, None] + column[None, :], mask=real[:, None]
    )


@gluon.jit
def copy_warps(a, descs, buffers, bars, sizes, tiles_ptr, claims_ptr, GATHER: gl.constexpr,
                TOP_K: gl.constexpr, GROUP: gl.constexpr,
                TALL_FIRST: gl.constexpr):  # fmt: skip
    """Claim items, post them, and copy their rows and weights into the buffers, stage by stage."""
    w_desc, _ = descs
    a_bufs, w_bufs, _, items = buffers
    empty, ready, item_free, item_posted = bars
    num_tiles, num_blocks, steps = sizes
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    ROWS: gl.constexpr = a_bufs.type.shape[1]
    BLOCK_K: gl.constexpr = a_bufs.type.shape[2]
    COLUMNS: gl.constexpr = w_desc.block_type.shape[2]
    A_BYTES: gl.constexpr = ROWS * BLOCK_K * 2
    W_BYTES: gl.constexpr = w_desc.block_type.nbytes
    # Eight threads copy the 128 bytes of a row, 16 bytes each.
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    num_items = num_tiles * num_blocks
    item = gl.program_id(0)
    turn, count = 0, 0
    while item < num_items:
        _post(items, item_free, item_posted, item, turn)
        # Claimed early: the answer comes while this item's copies are started.
        claimed = gl.atomic_add(claims_ptr, 1)
        expert, row, valid, column = locate(
            item, num_tiles, num_blocks, tiles_ptr, GROUP, TALL_FIRST
        )
        both = valid > ROWS
        if GATHER:
            low_ptr, low_real = _token_rows(a, row, True, ROWS, TOP_K, TILE)
            high_ptr, high_real = _token_rows(a, row + ROWS, both, ROWS, TOP_K, TILE)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            bar = ready.index(stage)
            k = step * BLOCK_K
            if GATHER:
                mbarrier.expect(bar, W_BYTES)
            else:
                mbarrier.expect(bar, W_BYTES + A_BYTES, pred=not both)
                mbarrier.expect(bar, W_BYTES + 2 * A_BYTES, pred=both)
            tma.async_copy_global_to_shared(
                w_desc, [expert, 0, column * COLUMNS, k], bar, w_bufs.index(stage)
            )
            if GATHER:
                a_column = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, TILE))
                _gather_rows(a_bufs.index(2 * stage), low_ptr, low_real, a_column)
                if both:
                    _gather_rows(a_bufs.index(2 * stage + 1), high_ptr, high_real, a_column)
                # Each thread arrives when its own copies have landed.
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a, [row, k], bar, a_bufs.index(2 * stage))
                tma.async_copy_global_to_shared(
                    a, [row + ROWS, k], bar, a_bufs.index(2 * stage + 1), pred=both
                )
            count += 1
        item = gl.num_programs(0) + claimed
        turn += 1
    _post(items, item_free, item_posted, item, turn)
