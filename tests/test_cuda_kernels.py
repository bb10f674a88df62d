"""Every Triton kernel against float64, on ragged shapes and both page layouts. Needs a GPU."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.fused_moe import fused_moe
from ch15_helpers.kernels.kv_write import write_kv
from ch15_helpers.kernels.paged_attention import paged_attention
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import apply_rope, build_cos_sin_cache
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv
from ch15_helpers.kernels.swiglu import swiglu

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# ‖out − ref‖ / ‖ref‖: float32 with float32 products, and bfloat16's rounding of the inputs to P·V.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
BATCHES = {
    "decode, few": ([1] * 5, [1, 300, 33, 64, 1000]),
    "decode, many": ([1] * 40, [37 * i % 700 for i in range(40)]),
    "decode, one long": ([1], [5000]),
    "decode, skewed": ([1] * 9, [3] * 8 + [4097]),
    "chunks": ([7, 1, 20, 130], [7, 50, 60, 900]),
    "prompt": ([333], [333]),
}
SHAPES = [(9, 3, 64, 16), (32, 8, 128, 16), (4, 2, 16, 8), (8, 2, 96, 32), (4, 1, 256, 256)]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


def pages_and_batch(query_lens, context_lens, kv_heads, head_dim, page, dtype, layer_major):
    num_seqs = len(query_lens)
    width = max(1, -(-max(context_lens) // page))
    blocks = num_seqs * width + 3
    if layer_major:
        pages = torch.randn(2, 2, blocks, page, kv_heads, head_dim, device="cuda", dtype=dtype)
        pages = pages.permute(2, 0, 1, 3, 4, 5)
    else:
        pages = torch.randn(blocks, 2, 2, page, kv_heads, head_dim, device="cuda", dtype=dtype)
    tables = torch.randperm(blocks, device="cuda")[: num_seqs * width].view(num_seqs, width)
    starts = [0, *itertools.accumulate(query_lens)]
    batch = BatchMetadata(
        query_starts=torch.tensor(starts, device="cuda", dtype=torch.int32),
        context_lens=torch.tensor(context_lens, device="cuda", dtype=torch.int32),
        block_tables=tables.int(),
        slot_mapping=torch.empty(0, device="cuda", dtype=torch.int64),
        logits_indices=torch.empty(0, device="cuda", dtype=torch.int64),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )
    return pages, batch


def attention_float64(q, k_cache, v_cache, batch, scale):
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    group = q.shape[1] // k_cache.shape[2]
    for seq, context in enumerate(contexts):
        begin, end = starts[seq], starts[seq + 1]
        if context == 0:
            continue
        table = batch.block_tables[seq].long()
        k = k_cache[table].flatten(0, 1)[:context].double().repeat_interleave(group, 1)
        v = v_cache[table].flatten(0, 1)[:context].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].double(), k) * scale
        key = torch.arange(context, device=q.device)
        hidden = key > key[context - (end - begin) :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


@pytest.mark.parametrize("layer_major", [False, True], ids=["block_major", "layer_major"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), SHAPES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_paged_attention(lengths, heads, kv_heads, head_dim, page, dtype, layer_major):
    pages, batch = pages_and_batch(*lengths, kv_heads, head_dim, page, dtype, layer_major)
    q = torch.randn(sum(lengths[0]), heads, head_dim, device="cuda", dtype=dtype)
    k, v, scale = pages[:, 1, 0], pages[:, 1, 1], head_dim**-0.5
    out = paged_attention(q, k, v, batch, scale, backend="triton")
    assert relative_error(out, attention_float64(q, k, v, batch, scale)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("hidden", [64, 576, 4096])
def test_rms_norm_adds_the_residual_and_normalises(hidden, dtype):
    x, residual = torch.randn(2, 37, hidden, device="cuda", dtype=dtype)
    weight = torch.randn(hidden, device="cuda", dtype=dtype)
    out, total = rms_norm(x, weight, 1e-5, residual)
    wide = (x + residual).double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.equal(total, x + residual)
    assert relative_error(out, expected) < BOUND[dtype]


def test_rms_norm_of_heads_reads_strided_rows():
    qkv = torch.randn(5, 12, 64, device="cuda")
    weight = torch.randn(64, device="cuda")
    wide = qkv[:, 2:9].double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert relative_error(rms_norm(qkv[:, 2:9], weight, 1e-6), expected) < 1e-6


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (5, 1, 96)])
def test_rope_rotates_pairs(heads, kv_heads, head_dim, dtype):
    qkv = torch.randn(7, heads + 2 * kv_heads, head_dim, device="cuda", dtype=dtype)
    q, k, _ = qkv.split((heads, kv_heads, kv_heads), 1)
    table = build_cos_sin_cache(head_dim, 5000, 1e4, device="cuda")
    positions = torch.tensor([0, 1, 2, 17, 999, 4998, 4999], device="cuda")
    cos, sin = table[positions].double()[:, None].chunk(2, -1)
    for x, out in zip((q, k), apply_rope(q, k, table, positions), strict=True):
        low, high = x.double().chunk(2, -1)
        expected = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        assert relative_error(out, expected) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("inner", [100, 1536, 14336])
def test_swiglu(inner, dtype):
    gate_up = torch.randn(11, 2 * inner, device="cuda", dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert relative_error(swiglu(gate_up), gate * gate.sigmoid() * up) < BOUND[dtype]


@pytest.mark.parametrize("layer_major", [False, True], ids=["block_major", "layer_major"])
def test_write_kv_writes_its_slots_and_nothing_else(layer_major):
    pages, _ = pages_and_batch([1], [90], 3, 64, 16, torch.bfloat16, layer_major)
    before = pages.clone()
    qkv = torch.randn(5, 9, 64, device="cuda", dtype=torch.bfloat16)
    k, v = qkv[:, 3:6], qkv[:, 6:]
    slots = torch.tensor([3, -1, 47, 16, -1], device="cuda")
    write_kv(pages[:, 1, 0], pages[:, 1, 1], k, v, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            where = (slot // 16, 1, slice(None), slot % 16)
            assert torch.equal(pages[where], torch.stack((k[row], v[row])))
            before[where] = pages[where]
    assert torch.equal(pages, before)


@pytest.mark.parametrize("layer_major", [False, True], ids=["block_major", "layer_major"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (5, 1, 96)])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_rope_and_write_kv_in_one_launch(heads, kv_heads, head_dim, dtype, layer_major):
    pages, _ = pages_and_batch([1], [90], kv_heads, head_dim, 16, dtype, layer_major)
    expected_pages = pages.clone()
    qkv = torch.randn(5, heads + 2 * kv_heads, head_dim, device="cuda", dtype=dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    table = build_cos_sin_cache(head_dim, 500, 1e4, device="cuda")
    positions = torch.tensor([0, 3, 17, 99, 400], device="cuda")
    slots = torch.tensor([3, -1, 47, 16, -1], device="cuda")
    expected_q, rotated_k = apply_rope(q, k, table, positions)
    write_kv(expected_pages[:, 1, 0], expected_pages[:, 1, 1], rotated_k, v, slots)
    cache = pages[:, 1, 0], pages[:, 1, 1]
    out = rope_and_write_kv(q, k, v, *cache, table, positions, slots)
    assert torch.equal(out, expected_q)
    assert torch.equal(pages, expected_pages)


def test_what_the_kernels_do_not_take_falls_back_and_says_so():
    wide = torch.randn(4, 64, device="cuda", dtype=torch.float64)
    with pytest.warns(UserWarning, match="they take no torch.float64"):
        out = swiglu(wide)
    gate, up = wide.chunk(2, -1)
    assert relative_error(out, gate * gate.sigmoid() * up) < 1e-12
    pages, batch = pages_and_batch([2], [40], 1, 320, 16, torch.bfloat16, False)
    q = torch.randn(2, 2, 320, device="cuda", dtype=torch.bfloat16)
    k, v = pages[:, 1, 0], pages[:, 1, 1]
    with pytest.warns(UserWarning, match="head_dim is 320"):
        out = paged_attention(q, k, v, batch, 320**-0.5)
    assert relative_error(out, attention_float64(q, k, v, batch, 320**-0.5)) < 2e-2
    x, weights = torch.randn(3, 36, device="cuda"), torch.rand(3, 2, device="cuda")
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]], device="cuda")
    gate_up, down = torch.randn(2, 20, 36, device="cuda"), torch.randn(2, 36, 10, device="cuda")
    with pytest.warns(UserWarning, match="cannot take torch.float32 experts of 36 x 10"):
        out = fused_moe(x, gate_up, down, weights, experts)
    inner = [swiglu(x.double().cpu() @ gate_up[e].double().cpu().T) for e in range(2)]
    outs = torch.stack([inner[e] @ down[e].double().cpu().T for e in range(2)], 1)
    mixed = torch.zeros(3, 2, dtype=torch.float64).scatter_(
        1, experts.cpu(), weights.double().cpu()
    )
    assert relative_error(out.cpu(), (mixed[:, :, None] * outs).sum(1)) < 1e-5


def test_a_fallback_is_said_once():
    wide = torch.randn(4, 64, device="cuda", dtype=torch.float64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            swiglu(wide)
    assert len(said) == 1
