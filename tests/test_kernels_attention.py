"""Paged attention of every backend against float64 maths written differently."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelzoo import BACKENDS, CPU_BACKENDS, make_batch, relative_error, scrambled_tables
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.paged_attention import default_backend, paged_attention

LAYERS, LAYER = 3, 1


def _pages(num_blocks: int, block_size: int, kv_heads: int, head_dim: int, layout: str) -> Tensor:
    """NaN everywhere, as memory that nobody has written may be."""
    shape = (num_blocks, LAYERS, 2, block_size, kv_heads, head_dim)
    if layout == "block_major":
        return torch.full(shape, float("nan"))
    memory = torch.full((LAYERS, 2, num_blocks, block_size, kv_heads, head_dim), float("nan"))
    return memory.permute(2, 0, 1, 3, 4, 5)


def _case(
    query_lens: list[int],
    context_lens: list[int],
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    block_size: int = 16,
    layout: str = "block_major",
    seed: int = 0,
) -> tuple[Tensor, Tensor, BatchMetadata, Tensor]:
    """Queries, pages, batch, and the expected output in float64."""
    generator = torch.Generator().manual_seed(seed)
    tables, num_blocks = scrambled_tables(context_lens, block_size, seed)
    pages = _pages(num_blocks, block_size, heads[1], head_dim, layout)
    batch, _ = make_batch(query_lens, context_lens, tables, block_size)
    q = torch.randn(sum(query_lens), heads[0], head_dim, generator=generator)
    expected = torch.empty_like(q, dtype=torch.float64)
    row = 0
    for query_len, context_len, table in zip(query_lens, context_lens, tables, strict=True):
        kv = torch.randn(2, context_len, heads[1], head_dim, generator=generator)
        for position in range(context_len):
            block, offset = table[position // block_size], position % block_size
            pages[block, LAYER, :, offset] = kv[:, position]
        for i in range(query_len):
            seen = context_len - query_len + i + 1
            for head in range(heads[0]):
                kv_head = head // (heads[0] // heads[1])
                keys, values = kv[:, :seen, kv_head].double()
                scores = keys @ q[row, head].double() * head_dim**-0.5
                expected[row, head] = scores.softmax(0) @ values
            row += 1
    return q, pages, batch, expected


def _to(batch: BatchMetadata, device: str) -> BatchMetadata:
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in fields.items()}
    return BatchMetadata(**moved | {"scratch": {}})


def _error(case: tuple[Tensor, Tensor, BatchMetadata, Tensor], backend: str, device: str) -> float:
    q, pages, batch, expected = case
    if backend == "triton" and device == "cpu":
        pytest.skip("the Triton backend runs on CUDA")
    pages = pages.to(device)
    k_cache, v_cache = pages[:, LAYER, 0], pages[:, LAYER, 1]
    scale = q.shape[-1] ** -0.5
    out = paged_attention(q.to(device), k_cache, v_cache, _to(batch, device), scale, backend)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    return relative_error(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["block_major", "layer_major"])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 2), (7, 1)])
def test_matches_float64(
    backend: str, layout: str, head_dim: int, heads: tuple[int, int], device: str
) -> None:
    """Decodes, a whole prompt, a later chunk and a prompt of one token in one batch."""
    case = _case([1, 17, 1, 9, 1, 1], [40, 17, 1, 33, 16, 90], heads, head_dim, layout=layout)
    assert _error(case, backend, device) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64])
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [31, 64, 1, 8]])
def test_page_sizes(backend: str, block_size: int, query_lens: list[int], device: str) -> None:
    if backend == "triton" and block_size == 24:
        pytest.skip("the Triton backend wants a power of two")
    case = _case(query_lens, [31, 64, 65, 130], block_size=block_size)
    assert _error(case, backend, device) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_skewed_decode_batch(backend: str, device: str) -> None:
    """One long sequence among short ones, which the CPU backend splits into several groups."""
    case = _case([1] * 12, [700, 3, 5, 1, 64, 65, 66, 130, 129, 2, 300, 16])
    assert _error(case, backend, device) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("query_len", "context_len"), [(127, 127), (129, 129), (300, 300), (130, 300), (20, 50), (2, 2)]
)
def test_long_prompts(backend: str, query_len: int, context_len: int, device: str) -> None:
    """Prompts and chunks on both sides of the CPU backend's block of 128 queries."""
    assert _error(_case([query_len], [context_len], (2, 1)), backend, device) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_that_are_no_matrix_of_slots(backend: str, device: str) -> None:
    """Head-major pages, which gathers cannot treat as rows."""
    q, pages, batch, expected = _case([1, 5, 1], [40, 20, 9])
    pages = pages.transpose(3, 4).contiguous().transpose(3, 4)
    assert _error((q, pages, batch, expected), backend, device) < 3e-6


@settings(max_examples=30, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=6),
    block_size=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 1000),
)
def test_random_mixes(lens: list[tuple[int, int]], block_size: int, seed: int) -> None:
    query_lens = [query_len for query_len, _ in lens]
    context_lens = [query_len + before for query_len, before in lens]
    case = _case(query_lens, context_lens, (4, 2), block_size=block_size, seed=seed)
    for backend in CPU_BACKENDS:
        assert _error(case, backend, "cpu") < 3e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_decode_without_host_lengths(backend: str) -> None:
    """What a captured step passes: only tensors, and padding sequences of no context."""
    q, pages, batch, expected = _case([1, 1, 1], [33, 5, 20])
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    fields |= {"query_lens_host": (), "context_lens_host": (), "scratch": {}}
    bare = BatchMetadata(**fields)
    out = paged_attention(q, pages[:, LAYER, 0], pages[:, LAYER, 1], bare, 16**-0.5, backend)
    assert relative_error(out, expected) < 3e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_changed_block_changes_only_its_readers(backend: str) -> None:
    q, pages, batch, _ = _case([1, 4, 1], [40, 20, 17])
    k_cache, v_cache = pages[:, LAYER, 0], pages[:, LAYER, 1]
    before = paged_attention(q, k_cache, v_cache, batch, 0.25, backend)
    v_cache[int(batch.block_tables[0, 1])] += 0.5
    after = paged_attention(q, k_cache, v_cache, batch, 0.25, backend)
    assert (after[0] - before[0]).abs().max() > 0.1
    assert torch.equal(after[1:], before[1:])


def test_backend_names() -> None:
    assert default_backend("cpu") == ("compiled" if "compiled" in CPU_BACKENDS else "sdpa")
    assert default_backend("cuda") == "triton"
    q, pages, batch, _ = _case([1], [4])
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        paged_attention(q, pages[:, 1, 0], pages[:, 1, 1], batch, 1.0, "flash")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_falls_back_with_a_warning() -> None:
    """Head size 288: no kernel for it, so ``auto`` says so and still gives the right answer."""
    case = _case([1, 5], [40, 20], head_dim=288)
    with pytest.warns(UserWarning, match="uses sdpa, not triton: head_dim is 288"):
        assert _error(case, "auto", "cuda") < 3e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _error(_case([1, 5], [40, 20], head_dim=24), "auto", "cuda") < 3e-6
