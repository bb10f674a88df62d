"""What the host prepares for the attention kernels: parts of a batch, and the plan of a prefill."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.batch_split import leading_decodes, split_chunks, split_decodes
from ch15_helpers.kernels.paged_attention import paged_attention
from ch15_helpers.kernels.prefill_plan import plan_prefill

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=6)


def _batch(query_lens: list[int], context_lens: list[int], page: int = 8) -> BatchMetadata:
    width = -(-max(context_lens) // page)
    tables = torch.randperm(len(query_lens) * width).view(len(query_lens), width).int()
    starts = torch.tensor([0, *np.cumsum(query_lens)]).int()
    nothing = torch.empty(0, dtype=torch.int64)
    return BatchMetadata(
        query_starts=starts,
        context_lens=torch.tensor(context_lens).int(),
        block_tables=tables,
        slot_mapping=nothing,
        logits_indices=nothing,
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        query_lens_host=tuple(query_lens),
        context_lens_host=tuple(context_lens),
    )


def _attend(q: torch.Tensor, pages: torch.Tensor, batch: BatchMetadata) -> torch.Tensor:
    return paged_attention(q, pages[0], pages[1], batch, 0.25, backend="reference")


@settings(max_examples=25, deadline=None)
@given(lens=LENGTHS, decodes=st.integers(0, 3), piece=st.integers(1, 20))
def test_parts_attend_as_the_whole(lens: list[tuple[int, int]], decodes: int, piece: int) -> None:
    query_lens = [1] * decodes + [query for query, _ in lens]
    context_lens = [9 * i + 1 for i in range(decodes)] + [query + before for query, before in lens]
    batch = _batch(query_lens, context_lens)
    pages = torch.randn(2, int(batch.block_tables.max()) + 1, 8, 1, 16)
    q = torch.randn(sum(query_lens), 2, 16)
    whole = _attend(q, pages, batch)
    torch.testing.assert_close(_attend(q, pages, split_chunks(batch, piece)), whole)
    count = leading_decodes(batch)
    assert count >= decodes
    if 0 < count < len(query_lens):
        first, rest = split_decodes(batch, count)
        parts = _attend(q[:count], pages, first), _attend(q[count:], pages, rest)
        torch.testing.assert_close(torch.cat(parts), whole)


def test_parts_are_made_once_a_step() -> None:
    batch = _batch([1, 30], [5, 30])
    assert split_chunks(batch, 16) is split_chunks(batch, 16)
    assert split_decodes(batch, 1)[1] is split_decodes(batch, 1)[1]


@settings(max_examples=50, deadline=None)
@given(lens=LENGTHS, size=st.sampled_from([4, 16, 32]), heads=st.integers(1, 8))
def test_plan_covers_every_query_once(lens: list[tuple[int, int]], size: int, heads: int) -> None:
    query_lens = [query for query, _ in lens]
    context_lens = [query + before for query, before in lens]
    items, offsets = plan_prefill(query_lens, context_lens, size, heads, programs=7)
    seen = np.zeros((sum(query_lens), heads), dtype=int)
    starts = np.cumsum([0, *query_lens])
    for row, count, key, position, head in items:
        assert 1 <= count <= size
        seen[row : row + count, head] += 1
        seq = int(np.searchsorted(starts, row, side="right")) - 1
        assert row + count <= starts[seq + 1]
        assert key == offsets[seq] == sum(context_lens[:seq])
        assert position == context_lens[seq] - query_lens[seq] + row - starts[seq]
    assert (seen == 1).all()


def test_plan_is_balanced() -> None:
    """A prompt of 8000 tokens on 132 processors: within 2 % of the mean."""
    items, _ = plan_prefill([8000], [8000], 32, 8, programs=132)
    keys = items[:, 3] + items[:, 1]
    shares = np.array([keys[program::132].sum() for program in range(132)])
    assert shares.max() / shares.mean() < 1.02
