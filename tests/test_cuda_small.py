"""One small call of every GPU kernel, short enough to run under CUDA's compute-sanitizer.

``compute-sanitizer --error-exitcode 1 python -m pytest -q tests/test_cuda_small.py`` finds reads
and writes outside of tensors; ``--tool racecheck`` finds races in shared memory.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from test_cuda_attention import check, make_case
from test_cuda_kernels import BOUND, pages_and_batch, relative_error
from test_cuda_moe import on_gpu, plans
from test_cuda_sampling import arguments
from test_kernels_moe import dense_float64

from ch15_helpers.kernels.block_copy import gather_blocks, scatter_blocks
from ch15_helpers.kernels.kv_quant import dequantise, write_kv_quantised
from ch15_helpers.kernels.kv_write import write_kv
from ch15_helpers.kernels.moe_route import route_topk
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import apply_rope, build_cos_sin_cache
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv
from ch15_helpers.kernels.sampling import sample_tokens_torch
from ch15_helpers.kernels.swiglu import swiglu

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
]
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.mark.parametrize("kv_dtype", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "page", "layer_major"), [(64, 8, True), (96, 16, False), (128, 256, False)]
)
def test_decode(head_dim, page, layer_major, kv_dtype):
    lens = ([1] * 4, [1, 300, 0, 33])
    check(make_case(*lens, 6, 2, head_dim, page, BF16, layer_major, kv_dtype), 8e-3)


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_prompts_and_decodes_together(dtype, kv_dtype):
    bound = 8e-3 if dtype == BF16 else 1e-4
    check(make_case([1, 70, 200], [40, 70, 260], 8, 2, 128, 16, dtype, False, kv_dtype), bound)


def test_norm_rotation_activation_and_writes():
    qkv = torch.randn(5, 9, 96, device="cuda", dtype=BF16)
    q, k, v = torch.split(qkv, [5, 2, 2], 1)
    x, residual = torch.randn(2, 5, 100, device="cuda", dtype=BF16)
    wide = (x + residual).double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert relative_error(rms_norm(x, torch.ones_like(x[0]), 1e-5, residual)[0], expected) < 8e-3
    gate, up = x.double().chunk(2, -1)
    assert relative_error(swiglu(x), gate * gate.sigmoid() * up) < BOUND[BF16]
    pages, batch = pages_and_batch([1], [90], 2, 96, 16, BF16, False)
    together = pages.clone()
    table = build_cos_sin_cache(96, 50, 1e4, device="cuda")
    positions = torch.tensor([0, 3, 17, 49, 4], device="cuda")
    slots = torch.tensor([3, -1, 47, 16, -1], device="cuda")
    rotated, keys = apply_rope(q, k, table, positions)
    write_kv(pages[:, 1, 0], pages[:, 1, 1], keys, v, slots)
    cache = together[:, 1, 0], together[:, 1, 1]
    assert torch.equal(rope_and_write_kv(q, k, v, *cache, table, positions, slots), rotated)
    assert torch.equal(pages, together)
    stored = torch.zeros(6, 16, 2, 96, device="cuda", dtype=torch.int8)
    scales = torch.zeros(2, 6, 2, device="cuda")
    batch = replace(batch, slot_mapping=slots)
    write_kv_quantised(stored, stored.clone(), *scales, k, v, batch)
    # Steps of the largest magnitude over 127: about 3 / 127 / sqrt(12) of a normal value.
    assert relative_error(dequantise(stored, scales[0])[0, 3], k[0].double()) < 2e-2


@pytest.mark.parametrize("layer_major", [False, True], ids=["block_major", "layer_major"])
def test_blocks(layer_major):
    pages, _ = pages_and_batch([1], [90], 3, 64, 16, BF16, layer_major)
    ids = torch.tensor([5, 0, 3], device="cuda")
    data = gather_blocks(pages, ids)
    assert torch.equal(data, pages[ids])
    scatter_blocks(pages, ids, data.flip(0))
    assert torch.equal(pages[ids], data.flip(0))


@pytest.mark.parametrize("splits", [1, 4])
def test_sampling(splits):
    from ch15_helpers.kernels.sampling_triton import sample_tokens_triton

    given = arguments(torch.randn(9, 30011, device="cuda"))
    drawn = sample_tokens_triton(*given, splits=splits)
    assert torch.equal(drawn, sample_tokens_torch(*given))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_experts(dtype):
    from ch15_helpers.kernels.fused_moe_triton import fused_moe_triton

    inputs = on_gpu(150, 2, 4, 128, 80, dtype=dtype)
    expected = dense_float64(*inputs)
    for plan in plans(dtype):
        assert relative_error(fused_moe_triton(*inputs, plan=plan), expected) < 8e-3, plan
    weights, _ = route_topk(torch.randn(33, 60, device="cuda"), 4, True)
    assert torch.allclose(weights.sum(-1), torch.ones(33, device="cuda"))
