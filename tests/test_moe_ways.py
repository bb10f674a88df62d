"""Every way to run experts, against the float64 dense reference: random, tied, idle, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kernels_moe import dense_float64, in_fp8, make

from ch15_helpers.kernels.fused_moe import fused_moe
from ch15_helpers.kernels.moe_route import route_topk
from ch15_helpers.moe.experts import ExpertWeights, experts_loop, experts_sorted
from ch15_helpers.moe.load import load_statistics
from ch15_helpers.moe.routing import expert_counts, route_sigmoid

WAYS = {
    "fused": fused_moe,
    "loop": lambda x, g, d, w, ids: experts_loop(x, ExpertWeights(g, d), w, ids),
    "sorted": lambda x, g, d, w, ids: experts_sorted(x, ExpertWeights(g, d), w, ids),
}
SIZES = [(1, 2, 8, 64, 48), (3, 8, 64, 256, 128), (40, 2, 8, 64, 48), (700, 2, 8, 64, 48)]


def close(out, inputs, bound=1e-6):
    expected = dense_float64(*inputs)
    return float((out.double() - expected).norm()) <= bound * float(expected.norm()) + 1e-9


def drawn(seed):
    """Sizes, skew, repeated and foreign experts, all drawn from ``seed``."""
    random = np.random.default_rng(seed)
    experts = int(random.integers(1, 40))
    tokens = int(random.choice([0, 1, 2, 3, 5, 17, 64, 333]))
    shape = (tokens, int(random.integers(1, min(8, experts) + 1)), experts,
             8 * int(random.integers(1, 24)), 4 * int(random.integers(1, 24)))  # fmt: skip
    x, gate_up, down, weights, ids = make(*shape, seed=seed)
    if seed % 3 == 1:  # any expert, also twice for one token, most often the first ones
        ids = torch.from_numpy(random.geometric(0.3, ids.shape) - 1)
    elif seed % 3 == 2:  # experts of other ranks
        ids = torch.from_numpy(random.integers(-2, experts + 2, ids.shape))
    return x, gate_up, down, weights, ids


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_and_routing(seed):
    inputs = drawn(seed)
    for name, run in WAYS.items():
        assert close(run(*inputs), inputs), name


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_random_shapes_in_fp8_and_bfloat16(seed):
    x, gate_up, down, weights, ids = inputs = drawn(seed)
    values, scales, wide = in_fp8(gate_up, down)
    assert close(fused_moe(x, *values, weights, ids, scales), (x, *wide, weights, ids))
    rounded = tuple(t.bfloat16() for t in inputs[:3])
    assert close(fused_moe(*rounded, weights, ids), (*rounded, weights, ids), bound=2e-2)


@pytest.mark.parametrize("route", ["softmax", "sigmoid", "groups"])
@pytest.mark.parametrize("tokens", [1, 30, 500])
def test_ties_idle_experts_and_one_for_all(route, tokens):
    """Logits of few values: ties everywhere, experts 8 to 15 idle, expert 3 chosen by all."""
    x, gate_up, down, _, _ = make(tokens, 1, 16, 64, 48)
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randint(0, 2, (tokens, 16), generator=generator).float()
    logits[:, 8:] = -50.0
    logits[:, 3] = 9.0
    if route == "softmax":
        weights, ids = route_topk(logits, 4, normalise=True)
    else:
        groups = {"num_groups": 4, "top_groups": 2} if route == "groups" else {}
        weights, ids = route_sigmoid(logits, 4, **groups)
    counts = expert_counts(ids, 16)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert int(counts[3]) == tokens
    assert load_statistics(counts.tolist()).num_idle >= 8
    inputs = x, gate_up, down, weights, ids
    for name, run in WAYS.items():
        assert close(run(*inputs), inputs), name


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("where", ["hidden state", "weight of the router"])
def test_a_nan_stays_in_its_token(shape, where):
    tokens = shape[0] + 1
    x, gate_up, down, weights, ids = make(tokens, *shape[1:])
    ids = ids.clone()
    ids[1] = ids[0]  # a neighbour at the same experts
    clean = {name: run(x, gate_up, down, weights, ids) for name, run in WAYS.items()}
    (x if where == "hidden state" else weights)[1, 0] = float("nan")
    others = torch.arange(tokens) != 1
    for name, run in WAYS.items():
        out = run(x, gate_up, down, weights, ids)
        assert out[1].isnan().all(), name
        assert torch.allclose(out[others], clean[name][others], rtol=1e-5, atol=1e-6), name
