"""Simulated replicas: exact where a single one is known, deterministic, lazy without a trace."""

from __future__ import annotations

import math

import pytest

from ch15_helpers.serving.cluster import Cluster, Served, simulate_cluster
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.distributions import Fixed, Poisson, Uniform
from ch15_helpers.serving.request import SLO
from ch15_helpers.serving.router import Router
from ch15_helpers.serving.routing import ROUTING_POLICIES
from ch15_helpers.serving.simulator import Simulator, request_of, simulate
from ch15_helpers.serving.step_time import StepTimeModel
from ch15_helpers.serving.workload import Workload, azure_conversation, multi_turn, synthetic

MODEL = StepTimeModel(4e-3, 2e-5, 1e-9, 0.0, 1e-5, 3e-8)
CONFIG = SchedulerConfig(num_blocks=400, max_num_seqs=16, block_size=64)


def conversations(count: int, rate_per_s: float) -> Workload:
    return multi_turn(
        Poisson(rate_per_s), Uniform(1, 4), Uniform(20, 300), Uniform(5, 60), count, think_s=2.0
    )


def test_one_replica_is_the_simulator() -> None:
    workload = azure_conversation(300, rate_per_s=8)
    run = simulate_cluster(workload, Router(1), CONFIG, MODEL)
    alone = simulate(workload, CONFIG, MODEL)
    assert [s.ttft_s for s in run.served] == [o.metrics.ttft_s for o in alone.outputs]
    assert [s.e2e_s for s in run.served] == [o.metrics.e2e_s for o in alone.outputs]
    assert run.steps == (alone.steps,)
    assert run.duration_s == alone.duration_s


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
def test_lazy_replicas_equal_eager_ones(policy: str) -> None:
    """Advancing all replicas at each arrival is slow and obviously right."""
    workload, replicas = conversations(60, 20.0), 4
    run = simulate_cluster(workload, Router(replicas, policy), CONFIG, MODEL)
    cluster = Cluster(Router(replicas, policy), CONFIG, MODEL, key_block=16)
    for index, request in enumerate(workload):
        now_s = request.arrival_s
        # In order of time, as answers change loads one after the other.
        while (first := min(r.earliest_finish_s() for r in cluster.replicas)) <= now_s:
            for number, replica in enumerate(cluster.replicas):
                if replica.earliest_finish_s() == first:
                    cluster._answer(number, replica.advance(first))
        cluster.add(request, index)
    cluster.advance()
    assert [cluster.done[i] for i in range(len(workload))] == list(run.served)
    assert {s.replica for s in run.served} == set(range(replicas))
    cluster.router.check_invariants()
    assert cluster.router.num_open == 0


def test_runs_are_deterministic_and_seeded() -> None:
    workload = conversations(40, 10.0)

    def places(seed: int) -> list[int]:
        router = Router(5, "power_of_two", seed=seed)
        return [s.replica for s in simulate_cluster(workload, router, CONFIG, MODEL).served]

    assert places(1) == places(1) != places(2)


def test_the_earliest_finish_is_never_too_late() -> None:
    """The bound holds and gets tight: it is what lets a replica rest."""
    simulator = Simulator(CONFIG, MODEL)
    assert simulator.earliest_finish_s() == math.inf
    workload = azure_conversation(40, rate_per_s=30)
    for index, each in enumerate(workload):
        now_s = each.arrival_s
        simulator.advance(now_s)
        simulator.add(request_of(each, index))
    checks = 0
    while simulator.has_work:
        bound_s = simulator.earliest_finish_s()
        assert bound_s > simulator.now_s
        assert not simulator.advance(math.nextafter(bound_s, 0.0))
        simulator.advance(bound_s)
        checks += 1
    assert checks < 40 * 30


def test_a_prompt_that_never_fits_is_answered_too() -> None:
    workload = synthetic("w", Poisson(5.0), Fixed(10**6), Fixed(3), 2)
    run = simulate_cluster(workload, Router(2), CONFIG, MODEL)
    assert [s.completed for s in run.served] == [False, False]
    assert run.duration_s == 0.0
    assert run.attainment(SLO(1.0, 1.0)) == 0.0


def test_numbers_of_a_run() -> None:
    workload = conversations(30, 10.0)
    run = simulate_cluster(workload, Router(3, "least_outstanding_tokens"), CONFIG, MODEL)
    assert run.kind == "modelled"
    assert run.num_replicas == 3
    tokens = sum(r.num_output_tokens for r in workload)
    assert run.output_tokens_per_s == pytest.approx(tokens / run.duration_s)
    busy = [s.busy_s for s in run.steps]
    assert run.imbalance == pytest.approx(3 * max(busy) / sum(busy))
    limit = SLO(run.ttft_s.p50, math.inf)
    assert run.attainment(limit) == pytest.approx(0.5, abs=0.02)
    assert run.goodput_per_s(limit) == pytest.approx(
        run.attainment(limit) * len(workload) / run.duration_s
    )
    assert sum(run.steps[s.replica].num_steps > 0 for s in run.served) == len(workload)


def test_a_request_meets_both_limits_or_none() -> None:
    served = Served(0, True, 0.5, 0.05, 2.0, 0.1, 10, 0, 5)
    assert served.meets(SLO(0.5, 0.05))
    assert not served.meets(SLO(0.4, 0.05))
    assert not served.meets(SLO(0.5, 0.04))
    assert not served._replace(completed=False).meets(SLO(0.5, 0.05))


def test_looking_at_loads_pays_where_replicas_queue_and_not_before() -> None:
    """Near saturation the tail is shorter; with room for all, turns spread prompts best."""

    def tail_s(rate_per_s: float, policy: str) -> float:
        workload = azure_conversation(1500, rate_per_s=rate_per_s)
        return simulate_cluster(workload, Router(8, policy), CONFIG, MODEL).ttft_s.p99

    assert tail_s(90, "least_outstanding_tokens") < 0.8 * tail_s(90, "round_robin")
    assert tail_s(90, "power_of_two") < 0.8 * tail_s(90, "round_robin")
    assert tail_s(40, "least_outstanding_tokens") > tail_s(40, "round_robin")
