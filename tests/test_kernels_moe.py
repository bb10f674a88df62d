"""The mixture-of-experts block against a float64 dense reference: any routing, any size."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ch15_helpers.kernels.fused_moe import can_fuse, fused_moe, fused_moe_torch
from ch15_helpers.kernels.linear import linear
from ch15_helpers.kernels.moe_fp8 import dequantise_blocks, quantise_blocks
from ch15_helpers.kernels.moe_permute import max_tiles, sort_by_expert
from ch15_helpers.kernels.moe_route import route_topk
from ch15_helpers.kernels.swiglu import swiglu
from ch15_helpers.moe.dispatch import make_copies
from ch15_helpers.moe.experts import ExpertWeights, experts_loop
from ch15_helpers.moe.routing import drop_over_capacity

# (tokens, top k, experts, hidden, inner): each of the CPU's four ways, sizes that are not powers
# of two, rows that grouped products do not take, one expert.
SHAPES = [
    (1, 2, 8, 64, 48),
    (3, 8, 64, 256, 128),
    (7, 2, 8, 64, 48),
    (33, 3, 6, 40, 56),
    (64, 4, 16, 30, 22),
    (300, 2, 8, 64, 48),
    (900, 2, 8, 64, 96),
    (5, 1, 1, 16, 8),
]


def make(tokens, top_k, experts, hidden, inner, dtype=torch.float32, seed=0):
    """x, gate_up, down, weights, expert ids: distinct experts for each token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    gate_up = normal(experts, 2 * inner, hidden) / hidden**0.5
    return normal(tokens, hidden), gate_up, normal(experts, hidden, inner), weights, ids


def dense_float64(x, gate_up, down, weights, ids):
    """Every expert on every token, then the chosen ones: no sort, no grouping."""
    wide = torch.einsum("th,eih->tei", x.double(), gate_up.double())
    gate, up = wide.chunk(2, -1)
    y = torch.einsum("tei,ehi->teh", gate * gate.sigmoid() * up, down.double())
    chosen = torch.zeros(x.shape[0], down.shape[0] + 1, dtype=torch.float64, device=x.device)
    ours = (ids >= 0) & (ids < down.shape[0])
    chosen.scatter_add_(1, torch.where(ours, ids, down.shape[0]).long(), weights.double())
    return torch.einsum("te,teh->th", chosen[:, :-1], y)


def relative_error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_routing_matches_the_dense_reference(shape, dtype, bound):
    inputs = make(*shape, dtype=dtype)
    out = fused_moe(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, dense_float64(*inputs)) < bound


@pytest.mark.parametrize("shape", [(1, 1, 8, 64, 48), (20, 1, 8, 64, 48), (700, 1, 8, 64, 48),
                                   (3, 1, 8, 384, 256), (1, 1, 8, 384, 256)], ids=str)  # fmt: skip
def test_one_expert_gets_every_token_and_others_none(shape):
    x, gate_up, down, weights, _ = make(*shape)
    ids = torch.full((shape[0], 1), 5)
    inputs = (x, gate_up, down, weights, ids)
    assert relative_error(fused_moe(*inputs), dense_float64(*inputs)) < 1e-6


def test_no_tokens_give_no_rows():
    x, gate_up, down, weights, ids = make(4, 2, 8, 64, 48)
    assert fused_moe(x[:0], gate_up, down, weights[:0], ids[:0]).shape == (0, 64)


@pytest.mark.parametrize("shape", [(2, 2, 8, 64, 48), (40, 2, 8, 64, 48), (700, 2, 8, 64, 48),
                                   (2, 2, 16, 384, 256)], ids=str)  # fmt: skip
def test_a_nan_stays_in_its_token(shape):
    inputs, tokens = make(*shape), shape[0]
    clean = fused_moe(*inputs)
    inputs[0][1, 3] = float("nan")
    out = fused_moe(*inputs)
    assert out[1].isnan().all()
    others = torch.arange(tokens) != 1
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("shape", [(3, 3, 8, 64, 48), (60, 3, 8, 64, 48), (1, 3, 8, 384, 256)])
def test_an_expert_of_another_rank_adds_nothing(shape):
    x, gate_up, down, weights, ids = make(*shape)
    ids[::2, 1], ids[1::2, 0] = -1, 8 + 3
    inputs = (x, gate_up, down, weights, ids)
    assert relative_error(fused_moe(*inputs), dense_float64(*inputs)) < 1e-6
    ids.fill_(-1)
    assert torch.equal(fused_moe(*inputs), torch.zeros_like(x))


def test_ties_of_the_router_choose_one_set_of_experts(tiny_moe):
    """Equal scores: any choice is right, but each token's experts are distinct and weights add."""
    block = tiny_moe.layers[0].mlp
    weights, ids = block.route(torch.zeros(5, 64, device=tiny_moe.device))
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert torch.allclose(weights, torch.full_like(weights, 0.5))


def test_the_router_keeps_experts_distinct_between_nan_and_ties():
    logits = torch.zeros(3, 8)
    logits[1, 3], logits[2] = float("nan"), float("nan")
    weights, ids = route_topk(logits, 3, normalise=True)
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in ids.tolist())
    assert weights[1:].isnan().all()
    assert not weights[0].isnan().any()


@pytest.mark.parametrize(("align", "tile"), [(1, 1), (16, 16), (16, 64), (64, 128)])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_holds_every_pair_once_and_tiles_cover_them(align, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = 9
    tokens = int(torch.randint(1, 200, (), generator=generator))
    ids = torch.randint(-1, experts + 1, (tokens, 3), generator=generator)
    if seed == 0:
        ids.fill_(4)  # all tokens on one expert
    order = sort_by_expert(ids, experts, align, tile)
    flat = ids.flatten()
    num_tiles = int(order.counters[0])
    assert num_tiles <= order.tiles.shape[0] == max_tiles(flat.numel(), experts, tile)
    seen = []
    for expert, first, count, _ in order.tiles[:num_tiles].tolist():
        assert 0 < count <= tile
        assert first % align == 0
        pairs = order.rows[first : first + count].long()
        assert (flat[pairs] == expert).all()
        assert torch.equal(order.positions[pairs].long(), torch.arange(first, first + count))
        padding = order.rows[first + count : -(-(first + count) // align) * align]
        assert (padding == flat.numel()).all()
        seen += pairs.tolist()
    ours = (flat >= 0) & (flat < experts)
    assert sorted(seen) == ours.nonzero().flatten().tolist()
    assert (order.positions[~ours] == -1).all()


def test_the_order_is_stable():
    ids = torch.randint(0, 4, (50, 2), generator=torch.Generator().manual_seed(1))
    rows = sort_by_expert(ids, 4, 16, 16).rows
    pairs = rows[rows < 100]
    assert pairs.tolist() == ids.flatten().argsort(stable=True).tolist()


def test_only_aligned_rows_on_cuda_can_be_captured(tiny_moe):
    assert not can_fuse(torch.device("cpu"), torch.float32, 64, 48)
    assert not can_fuse(torch.device("cuda"), torch.float64, 64, 48)
    assert not can_fuse(torch.device("cuda"), torch.bfloat16, 64, 44)
    assert tiny_moe.layers[0].mlp.can_capture == (tiny_moe.device.type == "cuda")


class Bookkeeping(TorchDispatchMode):
    """Elements of all integer and boolean tensors that operations made, views left out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and not made.is_floating_point() and not func.is_view:
                self.elements += made.numel()
        return out


def looked_up(ids, num_experts):
    """A mask of tokens by experts, as in transformers' eager block: what must not happen."""
    return torch.nn.functional.one_hot(ids, num_experts).sum(1) > 0


BOOKKEEPERS = {
    "fused block": lambda ids, experts: fused_moe_torch(
        torch.zeros(len(ids), 8), torch.zeros(experts, 8, 8), torch.zeros(experts, 8, 4),
        torch.zeros(ids.shape), ids,
    ),
    "sort": lambda ids, experts: sort_by_expert(ids, experts, 1, 1 << 20),
    "padded sort": lambda ids, experts: sort_by_expert(ids, experts, 16, 64),
    "capacity": lambda ids, experts: drop_over_capacity(ids, experts, 9),
    "copies": lambda ids, experts: make_copies(ids, torch.zeros(ids.shape), experts // 4, 4, True),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BOOKKEEPERS, "mask"])
def test_bookkeeping_holds_nothing_of_tokens_times_experts(name):
    """Elements are a sum of terms in tokens and in experts, so a mixed difference vanishes."""
    work = BOOKKEEPERS.get(name, looked_up)
    made = {}
    for tokens in (1024, 2048):
        for experts in (64, 256):
            ids = torch.arange(2 * tokens).view(tokens, 2) % experts
            with Bookkeeping() as book:
                work(ids, experts)
            made[tokens, experts] = book.elements
    mixed = made[2048, 256] - made[2048, 64] - made[1024, 256] + made[1024, 64]
    if name == "mask":
        assert mixed > 1024 * 192
    else:
        assert made[2048, 256] > 0
        # Padding rounds, so a few elements for each expert are not a sum exactly.
        assert abs(mixed) <= 256


def in_fp8(gate_up, down):
    """((values, values), (scales, scales), (weights that they stand for) x 2), CPU or CUDA."""
    halves = gate_up.view(gate_up.shape[0], 2, -1, gate_up.shape[2])
    (gate_up8, gate_up_scale), (down8, down_scale) = quantise_blocks(halves), quantise_blocks(down)
    wide = dequantise_blocks(gate_up8, gate_up_scale, torch.float32).flatten(1, 2)
    scales = (gate_up_scale, down_scale)
    return (
        (gate_up8.view(gate_up.shape), down8),
        scales,
        (wide, dequantise_blocks(down8, down_scale, torch.float32)),
    )


@pytest.mark.parametrize("shape", [(1, 2, 8, 64, 48), (40, 2, 8, 256, 128), (9, 3, 4, 288, 130)])
def test_fp8_experts_equal_the_weights_they_stand_for(shape):
    x, gate_up, down, weights, ids = make(*shape)
    values, scales, wide = in_fp8(gate_up, down)
    out = fused_moe(x, *values, weights, ids, scales)
    assert relative_error(out, dense_float64(x, *wide, weights, ids)) < 1e-6
    ids[0, 0] = -1
    out = fused_moe(x, *values, weights, ids, scales)
    assert relative_error(out, dense_float64(x, *wide, weights, ids)) < 1e-6


def test_fp8_blocks_keep_their_own_range():
    """E4M3 has three bits after the point: half a step is 1/16 of a value, in every block."""
    weight = torch.randn(3, 200, 300, generator=torch.Generator().manual_seed(0))
    weight[0, :128, :128] *= 1e4
    weight[1, 128:, 128:256] = 0
    values, scales = quantise_blocks(weight)
    assert values.shape == weight.shape
    assert scales.shape == (3, 2, 3)
    error = (dequantise_blocks(values, scales, torch.float32) - weight).abs()
    subnormal = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :200, :300] * 2**-10
    assert (error <= weight.abs() / 16 + subnormal * 1.01).all()
    assert values.float().abs().amax(dim=(1, 2)).tolist() == [448.0] * 3


def looped_moe(x, gate_up, down, weights, ids):
    """What a competent engineer writes first: sort by expert, then one expert after another."""
    top_k, flat = ids.shape[1], ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=down.shape[0]).tolist()
    out, start = torch.zeros_like(x), 0
    for expert, count in enumerate(counts):
        if count:
            pairs = order[start : start + count]
            start += count
            tokens = pairs // top_k
            y = linear(swiglu(linear(x[tokens], gate_up[expert])), down[expert])
            out.index_add_(0, tokens, y * weights.flatten()[pairs, None])
    return out


@pytest.mark.parametrize("sizes", [(2, 8, 64, 48), (1, 4, 64, 48), (4, 32, 128, 64)], ids=str)
@torch.inference_mode()
def test_faster_than_the_loops_at_every_token_count(sizes):
    """Best of interleaved runs, which a busy machine disturbs least: 1.2 times to 4 when idle."""
    for tokens in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024):
        inputs = make(tokens, *sizes)
        experts = ExpertWeights(inputs[1], inputs[2])
        versions = {
            "fused": lambda given=inputs: fused_moe(*given),
            "sorted loop": lambda given=inputs: looped_moe(*given),
            "plain loop": lambda g=inputs, e=experts: experts_loop(g[0], e, g[3], g[4]),
        }
        best = dict.fromkeys(versions, float("inf"))
        for _ in range(40):
            for name, run in versions.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
            if best["fused"] < 0.9 * min(best["sorted loop"], best["plain loop"]):
                break
        assert best["fused"] < min(best["sorted loop"], best["plain loop"]), f"{tokens} tokens"


def test_both_loops_are_right():
    inputs = make(33, 2, 8, 64, 48)
    expected = dense_float64(*inputs)
    x, gate_up, down, weights, ids = inputs
    assert relative_error(looped_moe(*inputs), expected) < 1e-6
    looped = experts_loop(x, ExpertWeights(gate_up, down), weights, ids)
    assert relative_error(looped, expected) < 1e-6
