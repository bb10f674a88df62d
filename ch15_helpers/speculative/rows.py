"""Batches in which each sequence may have any number of query tokens and wanted logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ch15_helpers.serving.batch_builder import HostBatch, Int64


@dataclass(frozen=True, slots=True)
class QueryRow:
    """Consecutive tokens of one sequence, the first at position ``start``."""

    token_ids: Sequence[int]
    start: int
    table: Sequence[int]


def host_batch(rows: Sequence[QueryRow], logits_indices: Int64, block_size: int) -> HostBatch:
    """Inputs of one forward pass.

    Args:
        rows: one for each sequence; their blocks must be there.
        logits_indices: rows of the flat batch whose logits are wanted.
    """
    lengths = [len(row.token_ids) for row in rows]
    ends = [row.start + length for row, length in zip(rows, lengths, strict=True)]
    width = max(-(-end // block_size) for end in ends)
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for number, row in enumerate(rows):
        blocks = row.table[:width]
        tables[number, : len(blocks)] = blocks
    owner = np.repeat(np.arange(len(rows)), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    first = np.array([row.start for row in rows], dtype=np.int64)
    positions = np.arange(starts[-1], dtype=np.int64) + (first - starts[:-1])[owner]
    logical, offset = np.divmod(positions, block_size)
    return HostBatch(
        token_ids=np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for row in rows]),
        positions=positions,
        slot_mapping=tables[owner, logical].astype(np.int64) * block_size + offset,
        logits_indices=logits_indices.astype(np.int64),
        query_starts=starts,
        context_lens=np.array(ends, dtype=np.int32),
        block_tables=tables,
        query_lens=tuple(lengths),
    )
