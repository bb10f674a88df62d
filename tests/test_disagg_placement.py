"""The placement planner: exact search, feasible plans, costs that agree with the roofline."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers.bench.roofline import decode_step_work, prefill_work
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.placement import evaluate, possible_cuts, problem, search
from ch15_helpers.disagg.placement_cost import Cut, DeviceRates, ModelCosts, all_reduce_s
from ch15_helpers.disagg.placement_plan import Plan, Pool, Prediction
from ch15_helpers.disagg.placement_rates import (
    ServingLoad,
    closed_loop,
    decode_rate,
    handoff_s,
    prefill_rate,
    together,
    together_rate,
    wait_s,
)
from ch15_helpers.disagg.placement_topology import Level, Topology, gpu_cluster
from ch15_helpers.errors import PlacementError
from ch15_helpers.model.config import LLAMA3_8B, QWEN3_30B_A3B, TINY_MOE, ModelConfig
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.request import SLO
from ch15_helpers.serving.simulator import Simulator, request_of, simulate
from ch15_helpers.serving.step_time import StepFeatures, StepTimeModel
from ch15_helpers.serving.step_time_data import load_step_time
from ch15_helpers.serving.workload import Workload, WorkloadRequest

GPU = DeviceRates(read_GBps=4000, tflops=600, memory_bytes=130e9, overhead_s=1e-3)
SMALL = replace(LLAMA3_8B, num_hidden_layers=4, num_key_value_heads=4)


def costs_of(config: ModelConfig, topology: Topology, device: DeviceRates = GPU) -> ModelCosts:
    return ModelCosts(config, device, topology)


def small_topology(islands: int, size: int, inner: float, outer: float) -> Topology:
    levels = [Level("node", size, LinkModel(5e-6, inner))]
    if islands > 1:
        levels.append(Level("rack", islands * size, LinkModel(2e-5, outer)))
    return Topology(tuple(levels))


def every_plan(costs: ModelCosts, cuts: list[Cut]) -> list[Plan]:
    total = costs.topology.num_devices
    plans = [Plan(Pool(cut, n)) for cut in cuts for n in range(1, total // cut.num_devices + 1)]
    for level, ahead, behind in itertools.product(costs.topology.levels, cuts, cuts):
        parts, size = total // level.num_devices, level.num_devices
        for p, d in itertools.product(range(1, size + 1), range(1, size + 1)):
            if p * ahead.num_devices + d * behind.num_devices <= size:
                plans.append(Plan(Pool(behind, d), Pool(ahead, p), level.name, parts))
    return plans


scenes = st.fixed_dictionaries(
    {
        "islands": st.sampled_from([1, 2]),
        "size": st.sampled_from([2, 3, 4]),
        "inner": st.sampled_from([20.0, 400.0]),
        "outer": st.sampled_from([0.05, 1.0, 48.0]),
        "prompt": st.sampled_from([16, 700, 6000]),
        "output": st.sampled_from([2, 60, 900]),
        "ttft": st.sampled_from([0.02, 0.2, 2.0]),
        "tpot": st.sampled_from([0.003, 0.02, 0.2]),
        "memory": st.sampled_from([3.2e9, 6e9, 40e9]),
        "moe": st.booleans(),
    }
)


def scene_of(values: dict[str, float]) -> tuple[ModelCosts, ServingLoad]:
    config = replace(QWEN3_30B_A3B, num_hidden_layers=4, num_experts=8) if values["moe"] else SMALL
    topology = small_topology(
        int(values["islands"]), int(values["size"]), values["inner"], values["outer"]
    )
    device = replace(GPU, memory_bytes=values["memory"])
    slo = SLO(values["ttft"], values["tpot"])
    load = ServingLoad(int(values["prompt"]), int(values["output"]), slo)
    return costs_of(config, topology, device), load


def found(costs: ModelCosts, load: ServingLoad) -> Prediction | None:
    try:
        return search(costs, load).best
    except PlacementError:
        return None


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_search_equals_brute_force_and_never_returns_an_infeasible_plan(
    values: dict[str, float],
) -> None:
    costs, load = scene_of(values)
    cuts = possible_cuts(costs, load, costs.topology.num_devices)
    best = found(costs, load)
    predictions = (evaluate(plan, costs, load) for plan in every_plan(costs, cuts))
    expected = max((each.goodput_per_s for each in predictions), default=0.0)
    assert (best.goodput_per_s if best else 0.0) == pytest.approx(expected, rel=1e-9)
    if best is None:
        return
    assert problem(best.plan, costs, load) is None
    assert best.plan.num_devices <= costs.topology.num_devices
    assert best.memory_fraction <= 1 + 1e-9
    assert best.ttft_s <= load.slo.ttft_s * (1 + 1e-9)
    assert best.tpot_s <= load.slo.tpot_s * (1 + 1e-9)


def test_search_equals_brute_force_where_separate_pools_win() -> None:
    costs = costs_of(LLAMA3_8B, gpu_cluster(1))
    cuts = [Cut(), Cut(tp=2), Cut(cp=2), Cut(pp=2)]
    apart = 0
    for prompt, output, tpot_s in itertools.product(
        (900, 2048, 5000), (64, 256, 1000), (0.012, 0.02)
    ):
        load = ServingLoad(prompt, output, SLO(0.6, tpot_s))
        best = search(costs, load, cuts).best
        predictions = [evaluate(plan, costs, load) for plan in every_plan(costs, cuts)]
        expected = max(each.goodput_per_s for each in predictions)
        assert best.goodput_per_s == pytest.approx(expected, rel=1e-12), load
        apart += best.plan.prefill is not None
    assert apart >= 5, "too few cases in which the ratio matters"


def test_the_handoff_costs_time_and_ports() -> None:
    costs, load = costs_of(LLAMA3_8B, gpu_cluster(1)), ServingLoad(2048, 101, SLO(0.6, 0.02))
    free, waiting = decode_rate(costs, Cut(), load), decode_rate(costs, Cut(), load, 0.5)
    assert waiting.batch < free.batch and waiting.tpot_s <= 0.02
    step_s = costs.decode(Cut(), waiting.batch, load.mean_context).total_s
    assert waiting.tpot_s == pytest.approx(step_s + 0.5 / 100)
    thin = LinkModel(1e-5, 0.1)
    carried = 0.1e9 / (2048 * costs.kv_token_bytes)
    for cut in (Cut(), Cut(tp=2)):
        behind = decode_rate(costs, cut, load, 0.0, thin)
        ahead = prefill_rate(costs, cut, load, thin)
        assert behind.bound == ahead.bound == "handoff"
        assert behind.rate_per_s == pytest.approx(cut.num_devices * carried)
        assert ahead.rate_per_s == pytest.approx(cut.num_devices * carried)
    transfer_s = thin.transfer_s(2048 * costs.kv_token_bytes)
    hidden_s = costs.prefill(Cut(), 2048).total_s * 31 / 32
    assert handoff_s(costs, Cut(), Cut(), load, thin) == pytest.approx(transfer_s - hidden_s)


@given(scenes, st.sampled_from([1.5, 10.0]))
@settings(max_examples=40, deadline=None)
def test_a_faster_link_never_makes_it_worse(values: dict[str, float], factor: float) -> None:
    costs, load = scene_of(values)
    slow = found(costs, load)
    for level in costs.topology.levels:
        faster = costs.topology.with_bandwidth(level.name, level.link.bandwidth_GBps * factor)
        fast = found(replace(costs, topology=faster), load)
        before = slow.goodput_per_s if slow else 0.0
        assert (fast.goodput_per_s if fast else 0.0) >= before * (1 - 1e-9)


@pytest.mark.parametrize("config", [LLAMA3_8B, QWEN3_30B_A3B], ids=["dense", "moe"])
def test_uncut_costs_are_those_of_the_roofline(config: ModelConfig) -> None:
    costs = costs_of(config, gpu_cluster(1))
    step = costs.decode(Cut(), 7, 500)
    work = decode_step_work(config, [500] * 7, 2)
    assert step.memory_s == pytest.approx(work.bytes / 4e12, rel=1e-9)
    assert step.compute_s == pytest.approx(work.flops / 600e12, rel=1e-9)
    prompt, work = costs.prefill(Cut(), 900), prefill_work(config, [900], 2)
    assert prompt.memory_s == pytest.approx(work.bytes / 4e12, rel=1e-9)
    assert prompt.compute_s == pytest.approx(work.flops / 600e12, rel=1e-9)
    assert step.communication_s == prompt.communication_s == 0
    assert costs.weight_bytes(Cut()) == pytest.approx(2 * config.num_parameters(), rel=1e-3)


def test_every_cut_divides_the_work_and_costs_communication() -> None:
    costs = costs_of(QWEN3_30B_A3B, gpu_cluster(2))
    whole = costs.prefill(Cut(), 2048)
    for cut in (Cut(tp=4), Cut(cp=4), Cut(pp=4), Cut(tp=4, ep=4)):
        part = costs.prefill(cut, 2048)
        assert part.compute_s == pytest.approx(whole.compute_s / 4, rel=0.02)
        assert part.communication_s > 0
        assert costs.weight_bytes(cut) < costs.weight_bytes(Cut()) or cut.cp > 1
    wide = Cut(ep=8)
    assert wide.groups == 8 and costs.kv_tokens(wide) > 8 * costs.kv_tokens(Cut())
    link = LinkModel(1e-5, 50.0)
    assert all_reduce_s(link, 4, 50e9) == pytest.approx(1.5 + 4e-5)


def test_an_inner_group_uses_the_inner_link() -> None:
    topology = gpu_cluster(8)
    assert [topology.level_for(n).name for n in (1, 8, 16, 32, 64)] == [
        "node", "node", "rack", "rack", "cluster",
    ]  # fmt: skip
    assert topology.level_for(3).name == "cluster", "groups of three straddle every border"
    fast, slow = costs_of(LLAMA3_8B, topology), costs_of(LLAMA3_8B, topology)
    slow = replace(slow, topology=topology.with_bandwidth("rack", 1.0))
    assert fast.decode(Cut(tp=8), 64, 100) == slow.decode(Cut(tp=8), 64, 100)
    across = Cut(tp=8, pp=2)
    assert fast.decode(across, 64, 100).total_s < slow.decode(across, 64, 100).total_s


def test_measured_step_times_are_taken_as_they_are() -> None:
    model = load_step_time("cpu").model
    costs = replace(costs_of(SMALL, gpu_cluster(1)), step_time=model)
    step = costs.decode(Cut(), 5, 130).total_s
    assert step == pytest.approx(model.decode_step_s(5, 650), rel=1e-12)
    features = StepFeatures(300, 300 * 301 // 2, 1, 0, 0, 0)
    assert costs.prefill(Cut(), 300).total_s == pytest.approx(model.step_s(features), rel=1e-12)
    assert costs.decode(Cut(tp=4), 5, 130).memory_s == pytest.approx(
        costs.decode(Cut(), 5, 130).memory_s / 4, rel=1e-9
    )


def test_short_prompts_need_no_second_pool_and_slow_links_forbid_it() -> None:
    slo = SLO(0.5, 0.03)
    short = search(costs_of(LLAMA3_8B, gpu_cluster(1)), ServingLoad(64, 256, slo)).best
    assert short.plan.prefill is None
    costs = costs_of(QWEN3_30B_A3B, gpu_cluster(4))
    long = ServingLoad(4096, 256, slo)
    assert search(costs, long).best.plan.prefill is not None
    topology = costs.topology
    for level in topology.levels:
        topology = topology.with_bandwidth(level.name, 0.01)
    assert search(replace(costs, topology=topology), long).best.plan.prefill is None


def test_thousands_of_devices_need_few_evaluations() -> None:
    result = search(costs_of(LLAMA3_8B, gpu_cluster(512)), ServingLoad(4096, 256, SLO(0.5, 0.03)))
    assert result.best.plan.num_devices <= 4096
    assert result.examined < 300 < result.pruned
    assert result == search(
        costs_of(LLAMA3_8B, gpu_cluster(512)), ServingLoad(4096, 256, SLO(0.5, 0.03))
    )
    assert any("communication" in line for line in result.best.explain())


# ---- against the scheduler on a virtual clock ---------------------------------------------------

STEPS = StepTimeModel(constant_s=0.02, prefill_token_s=4e-4, decode_s=8e-4, context_token_s=2e-6)
LOAD = ServingLoad(256, 64, SLO(0.6, 0.06))
SERVER = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=512, num_blocks=4000)


def one_copy() -> ModelCosts:
    return replace(costs_of(SMALL, gpu_cluster(1)), step_time=STEPS)


def open_loop(rate_per_s: float, count: int = 600) -> list[bool]:
    """Whether each request of a Poisson stream meets the SLO, in the middle of the run."""
    dice, now, requests = random.Random(5), 0.0, []
    for _ in range(count):
        now += dice.expovariate(rate_per_s)
        requests.append(WorkloadRequest(now, 256, 64))
    run = simulate(Workload("poisson", tuple(requests)), SERVER, STEPS)
    metrics = [output.metrics for output in run.outputs[100:500]]
    return [m.ttft_s <= LOAD.slo.ttft_s and m.tpot_s <= LOAD.slo.tpot_s for m in metrics]


def test_predicted_goodput_is_what_the_scheduler_reaches() -> None:
    at = together_rate(one_copy(), Cut(), LOAD)
    runs = [open_loop(factor * at.rate_per_s) for factor in (0.7, 1.35)]
    held = [sum(met) / len(met) for met in runs]
    assert held[0] > 0.9, held
    assert held[1] < 0.5, held


def test_predicted_closed_loop_is_what_the_scheduler_does() -> None:
    simulator, done, serial = Simulator(SERVER, STEPS), 0, itertools.count()

    def submit() -> None:
        request = WorkloadRequest(simulator.now_s, 256, 64)
        simulator.add(request_of(request, next(serial)))

    for _ in range(12):
        submit()
    warm_s = 0.0
    while done < 240:
        for _ in simulator.advance(simulator.earliest_finish_s()):
            done += 1
            submit()
            if done == 60:
                warm_s = simulator.now_s
    measured = 180 / (simulator.now_s - warm_s)
    predicted = closed_loop(one_copy(), None, Cut(), LOAD, 12)
    assert predicted.rate_per_s == pytest.approx(measured, rel=0.1)
    split = closed_loop(one_copy(), Cut(), Cut(), LOAD, 12)
    assert split.rate_per_s > predicted.rate_per_s, "two devices do more than one"
    assert split.batch < 12


def test_little_and_the_queue() -> None:
    costs = one_copy()
    at = together(costs, Cut(), LOAD, 20)
    assert at.batch == pytest.approx(at.rate_per_s * LOAD.decode_steps * at.tpot_s)
    assert wait_s(LOAD, 1.0, 0.1) == math.inf and wait_s(LOAD, 0.05, 0.1) == 0
    assert wait_s(LOAD, 0.9, 0.1) > wait_s(LOAD, 0.5, 0.1)


# ---- errors ------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    node = Level("node", 8, LinkModel(1e-6, 100.0))
    with pytest.raises(PlacementError, match="whole levels"):
        Topology((node, Level("rack", 12, node.link)))
    with pytest.raises(PlacementError, match="no level 'rack'"):
        Topology((node,)).with_bandwidth("rack", 3.0)
    with pytest.raises(PlacementError, match="racks"):
        gpu_cluster(6)
    with pytest.raises(PlacementError, match="9 devices were asked for"):
        Topology((node,)).level_for(9)
    with pytest.raises(PlacementError, match="positive"):
        DeviceRates(0, 1, 1)
    with pytest.raises(PlacementError, match="quantile"):
        ServingLoad(1, 2, SLO(1, 1), quantile=1.0)
    with pytest.raises(PlacementError, match="two output tokens"):
        ServingLoad(1, 1, SLO(1, 1))
    costs, load = costs_of(LLAMA3_8B, gpu_cluster(1)), ServingLoad(100, 10, SLO(1.0, 0.1))
    assert "KV heads" in str(Cut(tp=16).problem(LLAMA3_8B))
    assert "experts" in str(Cut(ep=2).problem(LLAMA3_8B))
    assert "multiple" in str(Cut(tp=2, cp=2, ep=2).problem(TINY_MOE))
    for plan, word in (
        (Plan(Pool(Cut(), 9)), "9 devices"),
        (Plan(Pool(Cut(), 0)), "without a copy"),
        (Plan(Pool(Cut(pp=3), 1)), "layers"),
        (Plan(Pool(Cut(), 4), Pool(Cut(), 4), "rack"), "no level"),
    ):
        with pytest.raises(PlacementError, match=word):
            evaluate(plan, costs, load)
    tight = replace(costs, device=replace(GPU, memory_bytes=1e9))
    with pytest.raises(PlacementError, match="fit on no cut"):
        search(tight, load)
    with pytest.raises(PlacementError, match="no plan keeps"):
        search(costs, replace(load, slo=SLO(1e-4, 0.1)))
