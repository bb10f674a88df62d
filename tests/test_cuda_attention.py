"""The attention kernels of the GPU against float64: every page size, type, mix and length."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.dispatch import is_hopper
from ch15_helpers.kernels.kv_quant import dequantise, quantise
from ch15_helpers.kernels.paged_attention import paged_attention, triton_unsupported_reason

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# ‖out − ref‖ / ‖ref‖; half precision rounds the inputs of P·V.
BOUND = {F32: 1e-5, BF16: 5e-3, F16: 1e-3}
QUANTISED = [torch.float8_e4m3fn, torch.int8]


def make_case(
    query_lens, context_lens, heads=8, kv_heads=2, head_dim=128, page=16, dtype=BF16,
    layer_major=False, kv_dtype=None,
):  # fmt: skip
    """Queries, K, V, scales, batch and what float64 arithmetic makes of them."""
    num_seqs = len(query_lens)
    width = max(1, -(-max(context_lens) // page))
    blocks = num_seqs * width + 3
    tail = (page, kv_heads, head_dim)
    shape = (2, 2, blocks, *tail) if layer_major else (blocks, 2, 2, *tail)
    pages = torch.randn(shape, device="cuda", dtype=F32)
    pages = pages.permute(2, 0, 1, 3, 4, 5) if layer_major else pages
    scales = None
    if kv_dtype is None:
        pages = pages.to(dtype)
        wide = pages.double()
    else:
        # Blocks of very different magnitudes, as outliers make them.
        pages = pages * torch.logspace(-3, 1, blocks, device="cuda").view(-1, 1, 1, 1, 1, 1)
        pages, scales = quantise(pages, kv_dtype)
        wide = dequantise(pages, scales).double()
    tables = torch.randperm(blocks, device="cuda")[: num_seqs * width].view(num_seqs, width)
    starts = [0, *itertools.accumulate(query_lens)]
    empty = torch.empty(0, device="cuda", dtype=torch.int64)
    batch = BatchMetadata(
        query_starts=torch.tensor(starts, device="cuda", dtype=torch.int32),
        context_lens=torch.tensor(context_lens, device="cuda", dtype=torch.int32),
        block_tables=tables.int(),
        slot_mapping=empty,
        logits_indices=empty,
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        query_lens_host=tuple(query_lens),
        context_lens_host=tuple(context_lens),
    )
    q = torch.randn(starts[-1], heads, head_dim, device="cuda", dtype=dtype)
    expected = attention_float64(q, wide[:, 1, 0], wide[:, 1, 1], batch)
    kv = (pages[:, 1, 0], pages[:, 1, 1])
    given = (None, None) if scales is None else (scales[:, 1, 0], scales[:, 1, 1])
    return q, kv, given, batch, expected


def attention_float64(q, k, v, batch):
    out = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
    starts = batch.query_starts.tolist()
    group = q.shape[1] // k.shape[2]
    for seq, context in enumerate(batch.context_lens.tolist()):
        begin, end = starts[seq], starts[seq + 1]
        if context == 0:
            continue
        table = batch.block_tables[seq].long()
        keys = k[table].flatten(0, 1)[:context].repeat_interleave(group, 1)
        values = v[table].flatten(0, 1)[:context].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].double(), keys) * q.shape[2] ** -0.5
        key = torch.arange(context, device="cuda")
        hidden = key > key[context - (end - begin) :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def attend(case, batch=None):
    q, kv, scales, own, _ = case
    scale = q.shape[2] ** -0.5
    return paged_attention(q, *kv, batch or own, scale, "triton", *scales)


def check(case, bound=None):
    q, *_, expected = case
    out = attend(case)
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < (bound or BOUND[q.dtype])


MIXES = {
    "decodes": ([1] * 7, [1, 300, 33, 64, 0, 129, 2000]),
    "one decode": ([1], [3000]),
    "skewed decodes": ([1] * 70, [9000] + [3] * 69),
    "verification": ([4, 1, 5, 4], [40, 1, 700, 1000]),
    "short chunk, long context": ([100], [3000]),
    "prompts": ([333, 64, 200], [333, 64, 200]),
    "chunks": ([300, 128], [1000, 700]),
    "decodes and chunks": ([1, 1, 1, 200, 70, 1], [50, 1, 700, 500, 70, 90]),
}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page"),
    [(9, 3, 64, 16), (32, 8, 128, 16), (8, 1, 96, 32), (4, 4, 256, 8), (16, 2, 128, 256)],
)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_mixes(mix, heads, kv_heads, head_dim, page, dtype):
    check(make_case(*mix, heads, kv_heads, head_dim, page, dtype))


@pytest.mark.parametrize("layer_major", [False, True], ids=["block_major", "layer_major"])
@pytest.mark.parametrize("page", [8, 16, 32, 64, 128, 256])
def test_page_sizes_and_layouts(page, layer_major):
    mix = ([1, 1, 150, 3], [700, 0, 800, 300])
    check(make_case(*mix, page=page, layer_major=layer_major))


@pytest.mark.parametrize("kv_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("mix", ["decodes", "verification", "decodes and chunks"])
def test_quantised_pages(mix, dtype, kv_dtype):
    for head_dim, page, layer_major in ((128, 16, False), (64, 8, True), (96, 32, False)):
        case = make_case(
            *MIXES[mix], 12, 4, head_dim, page, dtype, layer_major, kv_dtype
        )  # fmt: skip
        check(case, {F32: 1e-4, F16: 2e-3, BF16: 8e-3}[dtype])


def test_the_longest_scores_do_not_overflow_in_quantised_pages():
    """Every value of E4M3, subnormal ones included, against large and tiny queries."""
    case = make_case([1, 1], [64, 64], kv_dtype=torch.float8_e4m3fn)
    q, kv, scales, batch, _ = case
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[127], codes[255] = 0, 0
    for cache in kv:
        cache.view(torch.uint8).copy_(codes.repeat(cache.numel() // 256).view(cache.shape))
    scales = tuple(torch.full_like(s, 2.0**-6) for s in scales)
    q[0] *= 100
    q[1] *= 1e-3
    wide = [dequantise(cache, s).double() for cache, s in zip(kv, scales, strict=True)]
    check((q, kv, scales, batch, attention_float64(q, *wide, batch)), 8e-3)


def test_a_block_of_another_request_never_shows():
    """Stale NaN in pages outside of the context, and a NaN scale of a block that nobody reads."""
    for kv_dtype in (None, torch.float8_e4m3fn):
        case = make_case([1, 1, 130], [17, 40, 130], kv_dtype=kv_dtype)
        _, kv, scales, batch, _ = case
        last = batch.block_tables[0, 17 // 16].long()
        used = batch.block_tables.flatten().tolist()
        spare = next(i for i in range(kv[0].shape[0]) if i not in used)
        for cache in kv:
            if kv_dtype is None:
                cache[last, 17 % 16 :] = float("nan")
                cache[spare] = float("nan")
        if kv_dtype is not None:
            for scale in scales:
                scale[spare] = float("nan")
        check(case, 8e-3)


def test_idle_rows_get_zeros():
    case = make_case([1] * 6, [0, 5, 0, 0, 700, 0])
    out = attend(case)
    assert (out[[0, 2, 3, 5]] == 0).all()


def test_a_captured_step_follows_its_lengths():
    """One graph, replayed with other contexts and tables, gives what an eager call gives."""
    q, kv, scales, batch, _ = make_case([1] * 9, [700] * 9)
    captured = replace(batch, query_lens_host=(), context_lens_host=(), scratch={})
    attend((q, kv, scales, captured, None))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [attend((q, kv, scales, captured, None)) for _ in range(3)]
    for lens in ([700] * 9, [1] * 9, [0] * 9, [699, 3, 1, 0, 0, 64, 65, 128, 500]):
        captured.context_lens.copy_(torch.tensor(lens))
        graph.replay()
        wide = [cache.double() for cache in kv]
        expected = attention_float64(q, *wide, captured)
        for each in out:
            error = float((each.double() - expected).norm() / (expected.norm() + 1e-9))
            assert error < BOUND[BF16]


def test_layers_share_a_step_s_scratch():
    case = make_case([1, 1, 200], [600, 3, 900])
    first = attend(case)
    filled = set(case[3].scratch)
    assert torch.equal(attend(case), first)
    assert set(case[3].scratch) == filled != set()


def test_long_prompts_take_the_kernel_for_hopper():
    q, kv, _, batch, _ = make_case([300], [300])
    if not is_hopper(q.device):
        pytest.skip("no Hopper GPU")
    from ch15_helpers.kernels.paged_prefill_triton_hopper import worth_gathering

    assert worth_gathering(q, kv[0], batch)
    assert not worth_gathering(q.float(), kv[0], batch)
    assert not worth_gathering(q, kv[0], replace(batch, query_lens_host=()))


def test_rows_at_the_edge_of_a_tile_of_keys():
    """A tile of queries that straddles a tile of keys: its first rows see none of the last."""
    for before in range(90, 131, 10):
        check(make_case([70], [70 + before], 32, 8))


def test_quantised_pages_are_supported():
    q, kv, *_ = make_case([1], [5], kv_dtype=torch.int8)
    assert triton_unsupported_reason(q, kv[0]) is None
