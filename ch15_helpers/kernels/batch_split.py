"""Splitting one step's batch into parts that suit different attention kernels.

Parts are kept in the batch's scratch, because all layers of a step need the same ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata

Ints = npt.NDArray[np.integer[Any]]


def upload_int32(values: Ints, device: torch.device) -> Tensor:
    """int32 on a device; from pinned memory, so that the host does not wait for the device."""
    host = torch.from_numpy(values.astype(np.int32))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def leading_decodes(batch: BatchMetadata) -> int:
    """Sequences of one token at the start of the batch, where the scheduler puts them."""
    lens = batch.query_lens_host
    return next((i for i, length in enumerate(lens) if length != 1), len(lens))


def split_decodes(batch: BatchMetadata, decodes: int) -> tuple[BatchMetadata, BatchMetadata]:
    """The first ``decodes`` sequences, one token each, and the others."""
    key = ("split_decodes", decodes)
    if key not in batch.scratch:
        first = replace(
            batch,
            query_starts=batch.query_starts[: decodes + 1],
            context_lens=batch.context_lens[:decodes],
            block_tables=batch.block_tables[:decodes],
            max_query_len=1,
            query_lens_host=batch.query_lens_host[:decodes],
            context_lens_host=batch.context_lens_host[:decodes],
            scratch={},
        )
        rest = replace(
            batch,
            query_starts=batch.query_starts[decodes:] - decodes,
            context_lens=batch.context_lens[decodes:],
            block_tables=batch.block_tables[decodes:],
            query_lens_host=batch.query_lens_host[decodes:],
            context_lens_host=batch.context_lens_host[decodes:],
            scratch={},
        )
        batch.scratch[key] = first, rest
    parts: tuple[BatchMetadata, BatchMetadata] = batch.scratch[key]
    return parts


def cut(query_lens: Ints, context_lens: Ints, max_tokens: int) -> tuple[Ints, Ints, Ints]:
    """Cut queries into pieces of at most ``max_tokens``: the arithmetic of ``split_chunks``.

    Returns:
        For each piece its sequence, its number of queries, and the context that its last one sees.
    """
    pieces = -(-query_lens // max_tokens)
    seq = np.repeat(np.arange(len(pieces)), pieces)
    first = (np.arange(len(seq)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_tokens
    lens = np.minimum(max_tokens, query_lens[seq] - first)
    return seq, lens, (context_lens - query_lens)[seq] + first + lens


def split_chunks(batch: BatchMetadata, max_tokens: int) -> BatchMetadata:
    """The same queries as sequences of at most ``max_tokens`` queries each.

    A piece sees the context up to its own last token; its row of the block table is a copy. Needs
    the lengths on the host.
    """
    key = ("split_chunks", max_tokens)
    if key not in batch.scratch:
        seq, lens, contexts = cut(
            np.array(batch.query_lens_host), np.array(batch.context_lens_host), max_tokens
        )
        starts = np.concatenate(([0], np.cumsum(lens)))
        packed = np.concatenate((starts, contexts, seq))
        on_device = upload_int32(packed, batch.query_starts.device)
        rows = on_device[-len(seq) :]
        batch.scratch[key] = replace(
            batch,
            query_starts=on_device[: len(starts)],
            context_lens=on_device[len(starts) : -len(seq)],
            block_tables=batch.block_tables.index_select(0, rows),
            max_query_len=int(lens.max()),
            query_lens_host=tuple(lens.tolist()),
            context_lens_host=tuple(contexts.tolist()),
            scratch={},
        )
    part: BatchMetadata = batch.scratch[key]
    return part
