"""Computes again what did not arrive: any set of blocks of one sequence, from its token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.transformer import Transformer


def recompute_blocks(
    model: Transformer,
    cache: PagedKVCache,
    table: Sequence[int],
    token_ids: Sequence[int],
    indices: Sequence[int],
    *,
    attention_backend: str = "auto",
) -> int:
    """Fill some logical blocks of a sequence anew; the others must be right.

    Keys and values of a token depend on the tokens before it alone, so each run of missing blocks
    is one prefill chunk, and blocks behind it stay as they are.

    Args:
        table: physical blocks of the sequence.
        token_ids: tokens whose keys and values the blocks hold, from the first.
        indices: logical blocks to compute.

    Returns:
        How many tokens were computed.
    """
    size, num_tokens = cache.block_size, 0
    wanted = sorted({index for index in indices if index * size < len(token_ids)})
    while wanted:
        first = last = wanted.pop(0)
        while wanted and wanted[0] == last + 1:
            last = wanted.pop(0)
        start, stop = first * size, min((last + 1) * size, len(token_ids))
        positions = torch.arange(start, stop, device=cache.device)
        tokens = torch.tensor(token_ids[start:stop], device=cache.device)
        model.forward_hidden(
            tokens,
            positions,
            cache.pages,
            chunk_metadata(table, start, stop, cache),
            attention_backend=attention_backend,
            kv_scales=cache.scales,
        )
        num_tokens += stop - start
    return num_tokens


def chunk_metadata(
    table: Sequence[int], start: int, stop: int, cache: PagedKVCache
) -> BatchMetadata:
    """Metadata of one sequence whose tokens ``start .. stop - 1`` are computed."""
    size, device = cache.block_size, cache.device
    blocks = torch.tensor(list(table), device=device)
    positions = torch.arange(start, stop, device=device)
    return BatchMetadata(
        query_starts=torch.tensor([0, stop - start], dtype=torch.int32, device=device),
        context_lens=torch.tensor([stop], dtype=torch.int32, device=device),
        block_tables=blocks[None].int(),
        slot_mapping=blocks[positions // size] * size + positions % size,
        logits_indices=torch.tensor([stop - start - 1], device=device),
        max_query_len=stop - start,
        max_context_len=stop,
        query_lens_host=(stop - start,),
        context_lens_host=(stop,),
    )
