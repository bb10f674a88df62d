"""Routers against transformers, load statistics, synthetic and recorded routing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ch15_helpers.bench.roofline import expected_experts_touched
from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.moe_route import route_topk
from ch15_helpers.moe.experts import ExpertWeights, SharedExpert
from ch15_helpers.moe.load import (
    expected_touched,
    forecast_load,
    inclusion_probabilities,
    load_statistics,
    zipf_popularity,
)
from ch15_helpers.moe.placement import ExpertPlacement, SlotChooser
from ch15_helpers.moe.routing import (
    SyntheticRouter,
    drop_over_capacity,
    expert_capacity,
    expert_counts,
    rank_in_expert,
    record_routing,
    route_sigmoid,
    update_bias,
)


def same_choice(ours, theirs, num_experts):
    """Equal weights on equal experts, in whatever order."""
    dense = [
        torch.zeros(ids.shape[0], num_experts).scatter(1, ids.long(), weights.float())
        for weights, ids in (ours, theirs)
    ]
    return torch.allclose(*dense, rtol=1e-6, atol=1e-7)


def logits_of(tokens, experts, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3), (4, 4)])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_sigmoid_router_is_deepseek_v3s(groups, normalise):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    num_groups, top_groups = groups
    config = DeepseekV3Config(
        hidden_size=24, n_routed_experts=32, num_experts_per_tok=6, n_group=num_groups,
        topk_group=top_groups, norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(1)
    theirs.weight.data = torch.randn(32, 24, generator=generator)
    theirs.e_score_correction_bias.copy_(torch.randn(32, generator=generator) / 4)
    x = torch.randn(200, 24, generator=generator)
    with torch.no_grad():
        logits, weights, experts = theirs(x)
    ours = route_sigmoid(
        logits, 6, bias=theirs.e_score_correction_bias, num_groups=num_groups,
        top_groups=top_groups, normalise=normalise, scaling=2.5,
    )  # fmt: skip
    assert same_choice(ours, (weights, experts), 32)
    unbiased = route_sigmoid(logits, 6, num_groups=num_groups, top_groups=top_groups)
    assert not torch.equal(unbiased[1].sort(-1).values, experts.sort(-1).values)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-normalised", "qwen3-plain"])
def test_the_softmax_routers_are_mixtrals_and_qwen3s(kind):
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    normalise = kind != "qwen3-plain"
    if kind == "mixtral":
        theirs = MixtralTopKRouter(MixtralConfig(hidden_size=24, num_local_experts=16))
    else:
        config = Qwen3MoeConfig(
            hidden_size=24, num_experts=16, num_experts_per_tok=2, norm_topk_prob=normalise
        )
        theirs = Qwen3MoeTopKRouter(config)
    theirs.weight.data = logits_of(16, 24, seed=3)
    x = logits_of(100, 24, seed=4)
    with torch.no_grad():
        _, weights, experts = theirs(x)
        ours = route_topk(x @ theirs.weight.T, 2, normalise)
    assert same_choice(ours, (weights, experts), 16)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "deepseek"])
def test_blocks_are_those_of_transformers(kind):
    """Router, experts and, in DeepSeek-V3, the shared expert: the same output."""
    from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": 32, "num_experts_per_tok": 3}
    if kind == "mixtral":
        config = MixtralConfig(**sizes, intermediate_size=24, num_local_experts=8)
        theirs = MixtralSparseMoeBlock(config)
    elif kind == "qwen3":
        config = Qwen3MoeConfig(
            **sizes, moe_intermediate_size=24, num_experts=8, norm_topk_prob=True
        )
        theirs = Qwen3MoeSparseMoeBlock(config)
    else:
        config = DeepseekV3Config(
            **sizes, moe_intermediate_size=24, n_routed_experts=8, n_shared_experts=2, n_group=4,
            topk_group=2,
        )  # fmt: skip
        theirs = DeepseekV3MoE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    x = torch.randn(50, 32, generator=generator)
    with torch.no_grad():
        expected = theirs(x[None])
        expected = (expected[0] if isinstance(expected, tuple) else expected).view(50, 32)
        experts = ExpertWeights(theirs.experts.gate_up_proj, theirs.experts.down_proj)
        logits = x @ theirs.gate.weight.T
        if kind == "deepseek":
            routing = route_sigmoid(
                logits, 3, num_groups=4, top_groups=2, scaling=config.routed_scaling_factor
            )
            block = theirs.shared_experts
            gate_up = torch.cat((block.gate_proj.weight, block.up_proj.weight))
            out = experts(x, *routing) + SharedExpert(gate_up, block.down_proj.weight)(x)
        else:
            out = experts(x, *route_topk(logits, 3, True))
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_token_visits_few_groups_and_ties_give_distinct_experts():
    _, experts = route_sigmoid(logits_of(300, 32), 6, num_groups=8, top_groups=2)
    assert max(len(set(row)) for row in (experts // 4).tolist()) == 2
    _, tied = route_sigmoid(torch.zeros(5, 32), 6, num_groups=8, top_groups=2)
    assert all(len(set(row)) == 6 for row in tied.tolist())


def test_a_nan_logit_stays_in_its_token():
    logits = logits_of(6, 16)
    clean = route_sigmoid(logits, 3, num_groups=4, top_groups=2)
    logits[2, 5] = float("nan")
    weights, experts = route_sigmoid(logits, 3, num_groups=4, top_groups=2)
    others = torch.arange(6) != 2
    assert torch.equal(weights[others], clean[0][others])
    assert torch.equal(experts[others], clean[1][others])
    assert 0 <= int(experts.min()) <= int(experts.max()) < 16


def test_the_bias_balances_a_skewed_router_without_touching_weights():
    logits = logits_of(2000, 16) + torch.linspace(1.5, -1.5, 16)
    bias = torch.zeros(16)
    before = load_statistics(expert_counts(route_sigmoid(logits, 2)[1], 16).tolist())
    for _ in range(300):
        bias = update_bias(bias, expert_counts(route_sigmoid(logits, 2, bias=bias)[1], 16), 5e-3)
    weights, experts = route_sigmoid(logits, 2, bias=bias, normalise=False)
    after = load_statistics(expert_counts(experts, 16).tolist())
    assert before.max_over_mean > 2
    assert after.max_over_mean < 1.15
    assert torch.equal(weights, logits.sigmoid().gather(1, experts))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 5}, "equal size"),
        ({"num_groups": 4, "top_groups": 5}, "between 1 and num_groups"),
        ({"num_groups": 8, "top_groups": 1}, "eligible"),
    ],
)
def test_impossible_groups_are_refused(fields, message):
    with pytest.raises(MoEError, match=message):
        route_sigmoid(torch.zeros(2, 16), 3, **fields)


def test_load_statistics_have_their_textbook_values():
    even = load_statistics([5, 5, 5, 5])
    assert (even.gini, even.max_over_mean, even.num_idle) == (0, 1, 0)
    one = load_statistics([0, 0, 0, 12])
    assert one.gini == pytest.approx(0.75)
    assert (one.max_over_mean, one.num_idle) == (4, 3)
    assert one.overflow(3) == pytest.approx(0.75)
    assert load_statistics([1, 2, 3, 4]).gini == pytest.approx(0.25)
    assert load_statistics([0, 0]).overflow(0) == 0
    with pytest.raises(MoEError, match="finite"):
        load_statistics([1, float("nan")])
    with pytest.raises(MoEError, match="non-empty"):
        load_statistics([])


@pytest.mark.parametrize("seed", range(5))
def test_capacity_keeps_the_first_pairs_of_each_expert(seed):
    router = SyntheticRouter(6, 2, skew=1.2, seed=seed)
    _, experts = router.route(57)
    capacity = expert_capacity(57, 2, 6, 1.1)
    kept = drop_over_capacity(experts, 6, capacity)
    seen = dict.fromkeys(range(6), 0)
    for pair, expert in enumerate(experts.flatten().tolist()):
        assert int(rank_in_expert(experts, 6).flatten()[pair]) == seen[expert]
        assert int(kept.flatten()[pair]) == (expert if seen[expert] < capacity else -1)
        seen[expert] += 1
    dropped = int((kept < 0).sum())
    assert dropped > 0
    assert load_statistics([*seen.values()]).overflow(capacity) * 114 == pytest.approx(dropped)


def test_synthetic_routing_follows_its_popularity_and_its_seed():
    router, again = (SyntheticRouter(16, 1, skew=1.0, seed=5) for _ in range(2))
    weights, experts = router.route(40_000)
    assert torch.equal(experts, again.route(40_000)[1])
    shares = expert_counts(experts, 16).numpy() / 40_000
    assert np.abs(shares - router.popularity).max() < 0.01
    assert torch.allclose(weights.sum(-1), torch.ones(40_000))
    assert not torch.equal(experts, SyntheticRouter(16, 1, skew=1.0, seed=6).route(40_000)[1])
    uniform = expert_counts(SyntheticRouter(16, 4, seed=0).route(10_000)[1], 16)
    assert load_statistics(uniform.tolist()).max_over_mean < 1.05
    assert SyntheticRouter(8, 2).route(0)[1].shape == (0, 2)


@pytest.mark.parametrize("skew", [0.0, 0.6, 1.2])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (128, 8)])
def test_touched_experts_are_as_expected(num_experts, top_k, skew):
    popularity = zipf_popularity(num_experts, skew)
    router = SyntheticRouter(num_experts, top_k, skew=skew, seed=3)
    assert np.allclose(np.sort(router.popularity)[::-1], popularity)
    assert inclusion_probabilities(popularity, top_k).sum() == pytest.approx(top_k)
    for tokens in (1, 4, 32):
        batches = [router.route(tokens)[1] for _ in range(300)]
        seen = np.mean([len(torch.unique(experts)) for experts in batches])
        assert expected_touched(popularity, top_k, tokens) == pytest.approx(seen, rel=0.04)
        if skew == 0:
            uniform = expected_experts_touched(num_experts, top_k, tokens)
            assert expected_touched(popularity, top_k, tokens) == pytest.approx(uniform, rel=1e-9)
    assert expected_touched(popularity, num_experts, 1) == pytest.approx(num_experts, rel=1e-6)
    with pytest.raises(MoEError, match="not between"):
        expected_touched(popularity, num_experts + 1, 1)


@pytest.mark.parametrize("skew", [0.0, 0.8])
@pytest.mark.parametrize("tokens", [4, 256])
def test_forecast_loads_are_those_of_many_batches(tokens, skew):
    experts, top_k = 32, 4
    router = SyntheticRouter(experts, top_k, skew=skew, seed=4)
    capacity = expert_capacity(tokens, top_k, experts, 1.5)
    found = forecast_load(zipf_popularity(experts, skew), top_k, tokens, capacity)
    seen = []
    for _ in range(400):
        counts = expert_counts(router.route(tokens)[1], experts).tolist()
        load = load_statistics(counts)
        seen.append((experts - load.num_idle, load.max_over_mean, load.overflow(capacity)))
    touched, largest, dropped = np.mean(seen, axis=0)
    assert found.touched == pytest.approx(touched, rel=0.03)
    assert found.max_over_mean == pytest.approx(largest, rel=0.06)
    assert found.dropped == pytest.approx(dropped, rel=0.1, abs=0.005)
    free = forecast_load(zipf_popularity(experts, skew), top_k, tokens)
    assert (free.dropped, free.max_over_mean) == (0, found.max_over_mean)


def test_drift_moves_the_hot_experts_and_keeps_the_skew():
    still, drifting = (SyntheticRouter(32, 2, skew=1.0, drift=d, seed=1) for d in (0.0, 0.2))
    start = still.popularity, drifting.popularity
    for _ in range(30):
        still.route(1), drifting.route(1)
    assert np.array_equal(still.popularity, start[0])
    assert not np.array_equal(drifting.popularity, start[1])
    assert np.allclose(np.sort(drifting.popularity), np.sort(start[1]))
    still.shift()
    assert still.popularity.argmax() != start[0].argmax()


def test_recording_sees_what_a_forward_routes_and_leaves_no_trace(tiny_moe, tiny):
    ids = torch.arange(12, device=tiny_moe.device).view(1, 12)
    plain = tiny_moe.forward_dense(ids)
    with record_routing(tiny_moe) as trace:
        assert torch.equal(tiny_moe.forward_dense(ids), plain)
        tiny_moe.forward_dense(ids[:, :3])
    assert trace.experts(0).shape == (15, 2)
    assert not torch.equal(trace.experts(0), trace.experts(1))
    tiny_moe.forward_dense(ids)
    assert trace.experts(1).shape == (15, 2)
    with pytest.raises(MoEError, match="no mixture-of-experts"), record_routing(tiny):
        pass


def test_replicas_take_turns_and_near_ones_come_first():
    placement = ExpertPlacement(4, ((0, 1, 2), (0, 2, 3), (0, 3, 1)))
    experts = torch.tensor([[0, 1], [0, 3], [0, -1], [0, 2], [0, 1]])
    slots = SlotChooser(placement, rank=0)(experts)
    flat = [e for row in placement.slots for e in row]
    for expert, slot in zip(experts.flatten().tolist(), slots.flatten().tolist(), strict=True):
        assert (slot == -1) if expert < 0 else (flat[slot] == expert)
    assert sorted(expert_counts(slots[:, :1], 9)[[0, 3, 6]].tolist()) == [1, 2, 2]
    near = SlotChooser(placement, rank=1, ranks_per_node=2)(experts)
    assert set(near[:, 0].tolist()) == {3}
    assert near[0, 1] == 1 and near[1, 1] == 5


def test_placements_say_what_is_missing():
    even = ExpertPlacement.even(7, 3)
    assert even.slots == ((0, 1, 2), (3, 4, -1), (5, 6, -1))
    with pytest.raises(MoEError, match=r"missing \[1\]"):
        ExpertPlacement(3, ((0,), (2,)))
    with pytest.raises(MoEError, match="unknown"):
        ExpertPlacement(1, ((0,), (2,)))
    with pytest.raises(MoEError, match="cannot hold 9"):
        ExpertPlacement.even(9, 2, slots_per_rank=4)
    with pytest.raises(MoEError, match="same positive number"):
        ExpertPlacement(2, ((0,), ()))
