"""Which program computes which tile of queries: the host's share of a prefill, once a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def plan_prefill(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tokens_per_tile: int,
    num_kv_heads: int,
    programs: int,
) -> tuple[Int32, Int32]:
    """Tiles of queries for ``programs`` programs, of which number ``p`` takes rows p, p + n, ….

    A causal tile costs what its last query sees, so tiles differ by orders of magnitude. They are
    sorted, most keys first, and dealt back and forth, so that every program gets nearly the same.

    Args:
        query_lens, context_lens: of each sequence, the latter with the step's own tokens.
        tokens_per_tile: most queries in a tile.

    Returns:
        items: int32 [n, 5], a tile for one KV head: row of its first query in the flat batch,
            queries, row of the sequence's first key in the gathered keys, position of the first
            query, KV head.
        offsets: int32 [S], where each sequence's keys begin when all are gathered in order.
    """
    queries, contexts = np.array(query_lens), np.array(context_lens)
    q_starts = np.cumsum(queries) - queries
    offsets = np.cumsum(contexts) - contexts
    tiles = -(-queries // tokens_per_tile)
    seq = np.repeat(np.arange(len(tiles)), tiles)
    number = np.arange(len(seq)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = number * tokens_per_tile
    start = (contexts - queries)[seq] + first
    lens = np.minimum(tokens_per_tile, queries[seq] - first)
    fields = np.stack((q_starts[seq] + first, lens, offsets[seq], start), 1)
    order = np.argsort(-(start + lens), kind="stable")
    heads = np.tile(np.arange(num_kv_heads), len(order))[:, None]
    items = np.hstack((np.repeat(fields[order], num_kv_heads, 0), heads)).astype(np.int32)
    return _deal(items, programs), offsets.astype(np.int32)


def _deal(items: Int32, programs: int) -> Int32:
    """Every other round backwards."""
    whole = len(items) // programs * programs
    rounds = items[:whole].reshape(-1, programs, items.shape[1]).copy()
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return np.concatenate((rounds.reshape(whole, items.shape[1]), items[whole:]))
