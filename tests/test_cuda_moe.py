"""The fused mixture-of-experts kernels against float64 on ragged routings. Needs a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from test_kernels_moe import dense_float64, in_fp8, make, relative_error

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.kernels.fused_moe import fused_moe, fused_moe_torch
from ch15_helpers.kernels.moe_permute import _sort_reference, max_tiles, sort_by_expert
from ch15_helpers.kernels.moe_route import route_topk

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
]
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
# (tokens, top k, experts, hidden, inner)
SHAPES = [
    (1, 2, 8, 64, 48),
    (3, 8, 128, 256, 96),
    (40, 2, 8, 192, 160),
    (65, 4, 16, 96, 80),
    (500, 2, 4, 320, 208),
    (1500, 4, 16, 256, 384),
]


def on_gpu(*shape, dtype=torch.float32, seed=0):
    return tuple(tensor.cuda() for tensor in make(*shape, dtype=dtype, seed=seed))


def plans(dtype):
    from ch15_helpers.kernels.fused_moe_triton import MoEPlan

    if dtype == torch.float32:
        return [
            MoEPlan("vector", block_n=4, block_k=64),
            *(MoEPlan("tile", block_m=m, block_k=32) for m in (16, 32)),
        ]
    tiles = [
        MoEPlan("tile", m, n, k, 3) for m, n, k in ((16, 64, 128), (32, 64, 64), (64, 64, 128))
    ]
    hopper = torch.cuda.get_device_capability()[0] == 9
    wide = [MoEPlan("wide"), MoEPlan("wide", gather=False)] if hopper else []
    return [MoEPlan("vector", block_n=4, block_k=64), *tiles, *wide]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_matches_the_dense_reference(shape, dtype):
    from ch15_helpers.kernels.fused_moe_triton import fused_moe_triton

    inputs = on_gpu(*shape, dtype=dtype)
    expected = dense_float64(*inputs)
    for plan in plans(dtype):
        out = fused_moe_triton(*inputs, plan=plan)
        assert relative_error(out, expected) < BOUND[dtype], plan
        assert torch.equal(out, fused_moe_triton(*inputs, plan=plan)), f"{plan} is not repeatable"
    assert relative_error(fused_moe(*inputs), expected) < BOUND[dtype]


@pytest.mark.parametrize("tokens", [2, 100, 2000])
def test_skew_foreign_experts_and_nan(tokens):
    from ch15_helpers.kernels.fused_moe_triton import fused_moe_triton

    x, gate_up, down, weights, ids = on_gpu(tokens, 2, 8, 128, 96, dtype=torch.bfloat16)
    ids[:, 0] = 5  # one expert has every token
    ids[::3, 1] = -1
    ids[1::3, 1] = 8
    expected = dense_float64(x, gate_up, down, weights, ids)
    dirty = x.clone()
    dirty[1, 7] = float("nan")
    others = torch.arange(tokens, device="cuda") != 1
    for plan in plans(torch.bfloat16):
        out = fused_moe_triton(x, gate_up, down, weights, ids, plan=plan)
        assert relative_error(out, expected) < BOUND[torch.bfloat16], plan
        spoilt = fused_moe_triton(dirty, gate_up, down, weights, ids, plan=plan)
        assert spoilt[1].isnan().all(), plan
        assert torch.equal(spoilt[others], out[others]), plan


@pytest.mark.parametrize("tokens", [1, 9, 130, 3000, 20000])
def test_the_device_sorts_as_the_reference_does(tokens):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 33, (tokens, 4), generator=generator)
    for align, tile in ((16, 16), (64, 128)):
        sizes = (max_tiles(ids.numel(), 32, align) * align, max_tiles(ids.numel(), 32, tile))
        expected = _sort_reference(ids.flatten(), 32, align, tile, *sizes)
        order = sort_by_expert(ids.cuda(), 32, align, tile)
        count = int(order.counters[0])
        assert count == int(expected.counters[0])
        assert torch.equal(order.tiles[:count].cpu(), expected.tiles[:count])
        assert torch.equal(order.positions.cpu(), expected.positions)
        for _, first, rows in order.tiles[:count, :3].tolist():
            stop = -(-(first + rows) // align) * align
            assert torch.equal(order.rows[first:stop].cpu(), expected.rows[first:stop])


@pytest.mark.parametrize(
    "shape", [(2, 2, 8, 160, 144), (90, 2, 8, 288, 208), (700, 2, 4, 256, 384)]
)
def test_fp8_experts_equal_the_weights_they_stand_for(shape):
    from ch15_helpers.kernels.fused_moe_triton import MoEPlan, fused_moe_triton

    x, gate_up, down, weights, ids = on_gpu(*shape)
    values, scales, wide = in_fp8(gate_up, down)
    x = x.bfloat16()
    expected = dense_float64(x, *wide, weights, ids)
    ways = [MoEPlan("vector", block_n=2, block_k=256), MoEPlan("tile"), MoEPlan("tile", block_m=64)]
    if torch.cuda.get_device_capability()[0] == 9:
        ways.append(MoEPlan("wide"))
    for plan in ways:
        out = fused_moe_triton(x, *values, weights, ids, scales, plan)
        assert relative_error(out, expected) < BOUND[torch.bfloat16], plan
    assert relative_error(fused_moe(x, *values, weights, ids, scales), expected) < 8e-3


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (33, 128, 8), (9, 60, 4)])
def test_the_router_chooses_as_torch_does(tokens, experts, top_k, normalise):
    logits = torch.randn(tokens, experts, device="cuda")
    weights, ids = route_topk(logits, top_k, normalise)
    expected, expected_ids = route_topk(logits.cpu(), top_k, normalise)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.allclose(weights.cpu(), expected, atol=1e-6)


def test_the_router_gives_distinct_experts_to_ties_and_nan():
    logits = torch.zeros(3, 8, device="cuda")
    logits[1, 3], logits[2] = float("nan"), float("nan")
    weights, ids = route_topk(logits, 3, True)
    assert all(len(set(row)) == 3 and max(row) < 8 for row in ids.tolist())
    assert weights[1:].isnan().all()
    assert torch.allclose(weights[0], torch.full_like(weights[0], 1 / 3))


def test_plans_follow_the_rows_of_an_expert():
    from ch15_helpers.kernels.fused_moe_triton import choose_plan

    def kind(tokens, top_k, experts, dtype=torch.bfloat16, wide=True):
        plan = choose_plan(tokens, top_k, experts, dtype, wide)
        return plan.kind, plan.block_m if plan.kind == "tile" else None

    assert kind(1, 2, 8) == kind(4, 8, 128) == ("vector", None)
    assert kind(64, 8, 128) == ("tile", 16)
    assert kind(64, 2, 8) == ("tile", 32)
    assert kind(1024, 8, 128) == kind(128, 2, 8) == ("wide", None)
    assert kind(16384, 2, 8, wide=False) == ("tile", 64)
    assert kind(16384, 2, 8, dtype=torch.float32) == ("tile", 32)


@pytest.mark.parametrize("tokens", [1, 64, 1500])
def test_a_replayed_graph_follows_new_routing(tokens):
    inputs = on_gpu(tokens, 2, 8, 256, 192, dtype=torch.bfloat16)
    fused_moe(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(*inputs)
    for seed in (1, 2):
        fresh = on_gpu(tokens, 2, 8, 256, 192, dtype=torch.bfloat16, seed=seed)
        for fixed, new in zip(inputs, fresh, strict=True):
            fixed.copy_(new)
        graph.replay()
        assert relative_error(out, dense_float64(*fresh)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 70, 1500])
def test_a_recorded_call_follows_new_tensors_shapes_and_streams(tokens):
    kept = []
    for seed in range(3):  # the first call records, the others replay at other addresses
        inputs = on_gpu(tokens, 2, 8, 256, 192, dtype=torch.bfloat16, seed=seed)
        kept.append((*inputs, fused_moe(*inputs)))
        part = slice(tokens // 2 + 1)
        fewer = fused_moe(inputs[0][part], *inputs[1:3], inputs[3][part], inputs[4][part])
        assert relative_error(fewer, dense_float64(*inputs)[part]) < BOUND[torch.bfloat16]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for *inputs, out in kept:
        assert relative_error(out, dense_float64(*inputs)) < BOUND[torch.bfloat16]
        with torch.cuda.stream(side):
            again = fused_moe(*inputs)
        side.synchronize()
        assert torch.equal(again, out)


def test_rows_in_odd_places_are_not_replayed():
    x, gate_up, down, weights, ids = on_gpu(70, 2, 8, 256, 192, dtype=torch.bfloat16)
    room = torch.empty(70 * 256 + 1, device="cuda", dtype=torch.bfloat16)
    shifted = room[1:].view(70, 256).copy_(x)  # 2 bytes past what a recording relies on
    columns = torch.empty(2, 70, device="cuda").copy_(weights.t()).t()
    expected = fused_moe(x, gate_up, down, weights, ids)
    assert torch.equal(fused_moe(shifted, gate_up, down, weights, ids), expected)
    assert torch.equal(fused_moe(x, gate_up, down, columns, ids), expected)


def test_rows_that_the_kernels_do_not_take_go_through_torch():
    inputs = on_gpu(50, 2, 6, 36, 26, dtype=torch.bfloat16)
    assert relative_error(fused_moe(*inputs), dense_float64(*inputs)) < BOUND[torch.bfloat16]
    assert torch.equal(fused_moe(*inputs), fused_moe_torch(*inputs))


def test_moe_decode_is_captured_and_gives_the_eager_tokens():
    model = load_model("random:TINY_MOE", device="cuda", dtype=torch.float32)
    prompts = [[1, 2, 3], [7, 8, 9, 10], [100] * 20, [5]]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    tokens = []
    for capture in (True, False):
        config = EngineConfig(max_num_seqs=4, num_blocks=64, capture_decode=capture)
        engine = Engine(model, config)
        assert (engine.runner.graphs is not None) == capture
        tokens.append([output.token_ids for output in engine.generate(prompts, params)])
    assert tokens[0] == tokens[1]
