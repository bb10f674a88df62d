"""Scheduling policies: what each is for, that none starves a request, and what they cost."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch15_helpers.serving.metrics import (
    MLPERF_SLOS,
    SLO,
    SLODefinition,
    meets,
    passes_mlperf,
    score,
)
from ch15_helpers.serving.policy import (
    FCFS,
    LeastSlack,
    Policy,
    PrefillFirst,
    Priority,
    Static,
    make_policy,
)
from ch15_helpers.serving.request import Request, RequestMetrics, RequestOutput, SamplingParams
from ch15_helpers.serving.scheduler import Scheduler, SchedulerConfig, Step
from ch15_helpers.serving.simulator import request_of, simulate
from ch15_helpers.serving.step_time import StepTimeModel
from ch15_helpers.serving.workload import Workload, WorkloadRequest, azure_conversation

H200_LIKE = StepTimeModel(0.005, 1.8e-5, 2e-11, 0.0, 2e-5, 3e-8)


def request(name: str, prompt: int, max_tokens: int = 4, **terms: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, [1] * prompt, params, **terms)  # type: ignore[arg-type]


def make(policy: Policy | str, **limits: object) -> Scheduler:
    defaults: dict[str, object] = {"block_size": 4, "num_blocks": 64, "watermark": 0.0}
    return Scheduler(SchedulerConfig(**{**defaults, **limits}, policy=policy))  # type: ignore[arg-type]


def advance(scheduler: Scheduler, now_s: float = 0.0) -> Step:
    step = scheduler.schedule(now_s)
    scheduler.update(step, [50] * len(step.sampled), now_s)
    scheduler.check_invariants()
    return step


def shape(step: Step) -> tuple[str, str]:
    """Names of what decodes and of what is prefilled; single letters, so joined."""
    chunks = (f"{c.request.request_id}{c.num_tokens}" for c in step.chunks)
    return "".join(r.request_id for r in step.decodes), " ".join(chunks)


def run(scheduler: Scheduler, now_s: float = 0.0, limit: int = 200) -> list[tuple[str, str]]:
    shapes = []
    while scheduler.has_work:
        shapes.append(shape(advance(scheduler, now_s)))
        assert len(shapes) < limit, "no progress"
    return shapes


# ---- each policy by hand -------------------------------------------------------------------


def test_static_runs_a_batch_to_its_end_and_wastes_nothing_else() -> None:
    scheduler = make("static", max_num_seqs=3, max_num_batched_tokens=6)
    for name, prompt, tokens in (("a", 4, 2), ("b", 5, 4), ("c", 1, 1), ("d", 2, 1)):
        scheduler.add(request(name, prompt, tokens))
    first = shape(advance(scheduler))
    scheduler.add(request("e", 1, 1))
    assert [first, *run(scheduler)] == [
        ("", "a4 b2"),  # the batch is a, b, c: three slots; its prompts take two steps
        ("a", "b3 c1"),
        ("b", ""),  # a and c are done and cost nothing; d may not join
        ("b", ""),
        ("b", ""),
        ("", "d2 e1"),  # the next batch is all that has arrived by now
    ]


def test_static_takes_no_more_than_fits() -> None:
    scheduler = make("static", num_blocks=4)
    for name in "ab":
        scheduler.add(request(name, 9, 2))
    assert run(scheduler) == [("", "a9"), ("a", ""), ("", "b9"), ("b", "")]


def test_prefill_first_stalls_decodes_for_prompts_but_not_for_ever() -> None:
    scheduler = make(PrefillFirst(max_prefill_steps=2), max_num_batched_tokens=4)
    scheduler.add(request("a", 2, 3))
    assert shape(advance(scheduler)) == ("", "a2")
    for name in "bcd":
        scheduler.add(request(name, 4, 1))
    assert run(scheduler) == [("", "b4"), ("", "c4"), ("a", ""), ("", "d4"), ("a", "")]
    assert scheduler.blocks.allocator.num_used == 0


def test_prefill_first_computes_whole_prompts_like_v0() -> None:
    scheduler = make("prefill_first", max_num_batched_tokens=6, enable_chunked_prefill=False)
    for name, length in (("a", 4), ("b", 3), ("c", 9)):
        scheduler.add(request(name, length, 2))
    assert run(scheduler) == [("", "a4"), ("", "b3"), ("", "c9"), ("abc", "")]


def test_prefill_first_brings_swapped_requests_back() -> None:
    scheduler = make("prefill_first", num_blocks=6, preemption="swap", num_host_blocks=8)
    for name in "ab":
        scheduler.add(request(name, 8, 9))
    shapes = run(scheduler)
    assert scheduler.num_preemptions > 0 and scheduler.host_blocks.num_used == 0
    assert [s for s in shapes if s[1]] == [("", "a8 b8")]  # nothing was recomputed


def test_priority_and_ageing() -> None:
    policy = Priority(ageing_s=10.0)
    scheduler = make(policy, max_num_seqs=1)
    scheduler.add(request("a", 1, 1, priority=2, arrival_s=0.0))  # rank 20
    scheduler.add(request("b", 1, 1, priority=0, arrival_s=15.0))  # rank 15
    scheduler.add(request("c", 1, 1, priority=1, arrival_s=15.0))  # rank 25
    scheduler.add(request("d", 1, 1, priority=0, arrival_s=20.0))  # rank 20, after a
    assert [r.request_id for r in scheduler.waiting] == ["b", "a", "d", "c"]
    assert [chunk for _, chunk in run(scheduler)] == ["b1", "a1", "d1", "c1"]


def test_the_lowest_priority_is_preempted() -> None:
    scheduler = make("priority", num_blocks=4)
    scheduler.add(request("a", 8, 6, priority=1))
    scheduler.add(request("b", 8, 6, priority=0))
    advance(scheduler)
    while not (step := advance(scheduler)).preempted:
        pass
    assert [r.request_id for r in step.preempted] == ["a"]
    run(scheduler)


def test_least_slack_admits_whose_deadline_is_next() -> None:
    scheduler = make(LeastSlack(), max_num_seqs=1)
    for name, ttft_s in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        scheduler.add(request(name, 1, 1, slo=SLO(ttft_s, 1.0)))
    assert [chunk for _, chunk in run(scheduler)] == ["b1", "c1", "a1"]


def test_least_slack_takes_the_length_of_the_prompt_off_the_slack() -> None:
    scheduler = make(LeastSlack(token_s=0.1), max_num_seqs=1)
    scheduler.add(request("a", 1, 1, slo=SLO(1.0, 1.0)))
    scheduler.add(request("b", 9, 1, slo=SLO(1.5, 1.0)))  # must start by 0.6 s, a by 0.9 s
    assert [chunk for _, chunk in run(scheduler)] == ["b9", "a1"]


def test_least_slack_lets_the_lost_stand_back_but_not_for_ever() -> None:
    # a must start by 1 s, b by 2 s, c by 9 s; two seconds later they may not be passed over.
    for now_s, order in ((0.5, "abc"), (1.5, "bca"), (2.5, "cab"), (3.5, "acb"), (4.5, "abc")):
        scheduler = make(LeastSlack(max_overdue_s=2.0), max_num_seqs=1)
        for name, ttft_s in (("a", 1.0), ("b", 2.0), ("c", 9.0)):
            scheduler.add(request(name, 1, 1, slo=SLO(ttft_s, 1.0)))
        assert [c[0] for _, c in run(scheduler, now_s)] == list(order), now_s


def test_an_urgent_prompt_overtakes_a_long_one_under_way() -> None:
    shapes = {}
    for policy in (FCFS(), LeastSlack()):
        scheduler = make(policy, max_num_batched_tokens=8)
        scheduler.add(request("a", 40, 1, slo=SLO(60.0, 1.0)))
        advance(scheduler)
        scheduler.add(request("b", 3, 1, slo=SLO(1.0, 1.0)))
        shapes[policy.name] = run(scheduler)
    assert shapes["least_slack"][0] == ("", "b3 a5")
    assert shapes["fcfs"][3:] == [("", "a8"), ("", "b3")]


def test_prompts_under_way_stand_in_the_same_order() -> None:
    policy = LeastSlack(max_overdue_s=2.0, token_s=0.1)
    a, b, c = (request(n, 10, 1, slo=SLO(t, 1.0)) for n, t in (("a", 2.0), ("b", 3.0), ("c", 10.0)))
    for now_s, order in ((0.5, "abc"), (1.5, "bca"), (3.5, "acb"), (4.5, "abc")):
        ordered = sorted((c, b, a), key=lambda r: policy.urgency(r, now_s))
        assert "".join(r.request_id for r in ordered) == order, now_s
    a.num_computed_tokens = 9  # nearly done: it can wait until 1.9 s
    assert policy.urgency(a, 1.5) == (1.0, pytest.approx(1.9))
    # One that could never be in time does not thereby overtake those who came before it.
    hopeless = request("h", 100, 1, arrival_s=5.0, slo=SLO(1.0, 1.0))
    assert policy.rank(hopeless) == 5.0


def test_chunks_shrink_to_the_lead_that_decodes_have() -> None:
    policy = LeastSlack(token_s=0.01, step_s=0.05, min_chunk=4)
    scheduler = make(policy, max_num_batched_tokens=101, num_blocks=500)
    scheduler.add(request("a", 1, 50, slo=SLO(1.0, 0.25)))
    advance(scheduler, now_s=0.0)  # a's first token at 0 s: the next ones due at 0.25, 0.5, ...
    scheduler.add(request("b", 900, 1, slo=SLO(99.0, 1.0)))
    assert shape(advance(scheduler, 0.0)) == ("a", "b20")  # 0.25 - 0.05 s of slack
    assert shape(advance(scheduler, 0.1)) == ("a", "b35")  # due at 0.5
    assert shape(advance(scheduler, 0.69)) == ("a", "b4")  # 0.01 s of slack: the least chunk
    assert shape(advance(scheduler, 1.5)) == ("a", "b100")  # behind: it does not block prompts
    # Without estimates the budget is all there is.
    assert LeastSlack().prefill_budget(list(scheduler.running), 77, 0.0) == 77


def test_names_and_bad_settings() -> None:
    for name in ("fcfs", "static", "prefill_first", "priority", "least_slack"):
        assert make_policy(name).name == name
        assert SchedulerConfig(policy=name).policy == name
    own = Priority(ageing_s=3.0)
    assert make_policy(own) is own and make(own).policy is own
    with pytest.raises(ValueError, match="fcfs, least_slack, prefill_first, priority, static"):
        make_policy("lifo")
    for wrong in (
        lambda: PrefillFirst(0),
        lambda: Priority(0.0),
        lambda: LeastSlack(max_overdue_s=-1.0),
        lambda: LeastSlack(min_chunk=0),
        lambda: SLO(0.0, 1.0),
    ):
        with pytest.raises(ValueError):
            wrong()


# ---- no starvation -------------------------------------------------------------------------


def lead_s(policy: Policy, first: WorkloadRequest, later: WorkloadRequest) -> float:
    """How much later a request may arrive and still be admitted first; see serving.policy."""
    if isinstance(policy, Priority):
        return max(0.0, policy.ageing_s * (first.priority - later.priority))
    if isinstance(policy, LeastSlack):
        return (first.slo or policy.default_slo).ttft_s + policy.max_overdue_s
    return 0.0


POLICIES = st.one_of(
    st.just(FCFS()),
    st.just(Static()),
    st.builds(PrefillFirst, st.integers(1, 4)),
    st.builds(Priority, st.sampled_from([0.1, 1.0])),
    st.builds(
        LeastSlack,
        st.just(SLO(0.3, 0.05)),
        st.sampled_from([0.0, 0.5]),
        st.sampled_from([0.0, 1e-3]),
        st.just(0.01),
        st.integers(1, 20),
    ),
)
REQUESTS = st.lists(
    st.builds(
        WorkloadRequest,
        arrival_s=st.integers(0, 40).map(lambda n: n / 16),
        num_prompt_tokens=st.integers(1, 40),
        num_output_tokens=st.integers(1, 12),
        priority=st.integers(0, 3),
        slo=st.sampled_from([None, SLO(0.1, 0.02), SLO(1.0, 0.1)]),
    ),
    min_size=2,
    max_size=25,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=POLICIES,
    requests=REQUESTS,
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 40),
    num_blocks=st.integers(13, 40),
    chunked=st.booleans(),
    watermark=st.sampled_from([0.0, 0.2]),
    step_s=st.sampled_from([0.005, 0.1]),
)
def test_nobody_is_overtaken_beyond_the_lead_and_all_are_served(
    policy: Policy,
    requests: list[WorkloadRequest],
    max_num_seqs: int,
    budget: int,
    num_blocks: int,
    chunked: bool,
    watermark: float,
    step_s: float,
) -> None:
    requests.sort(key=lambda r: r.arrival_s)
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=4,
        num_blocks=num_blocks,
        enable_chunked_prefill=chunked,
        watermark=watermark,
        policy=policy,
    )
    outputs = simulate(Workload("w", tuple(requests)), config, StepTimeModel(step_s)).outputs
    assert [len(o.token_ids) for o in outputs] == [r.num_output_tokens for r in requests]
    started = [
        r.arrival_s + (o.metrics.queue_s or 0.0) for r, o in zip(requests, outputs, strict=True)
    ]
    for i, first in enumerate(requests):
        for j in range(i + 1, len(requests)):
            if requests[j].arrival_s > first.arrival_s + lead_s(policy, first, requests[j]):
                assert started[j] >= started[i], f"{j} was admitted before {i}"


@settings(max_examples=60, deadline=None)
@given(
    policy=POLICIES,
    requests=REQUESTS,
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 40),
)
def test_the_wait_is_at_most_the_work_that_is_ahead(
    policy: Policy, requests: list[WorkloadRequest], max_num_seqs: int, budget: int
) -> None:
    # With room for all KV, each step computes at least one token of a request that was admitted
    # before, so in steps the wait is at most the tokens of all that may come first.
    requests.sort(key=lambda r: r.arrival_s)
    config = SchedulerConfig(max_num_seqs, budget, 4, 2000, policy=policy)
    scheduler = Scheduler(config)
    pending = [request_of(each, i) for i, each in enumerate(requests)]
    terms = {id(r): each for r, each in zip(pending, requests, strict=True)}
    waited: dict[int, int] = {}
    everyone, now_s = list(pending), 0.0
    while pending or scheduler.has_work:
        if not scheduler.has_work:
            now_s = max(now_s, pending[0].arrival_s)
        while pending and pending[0].arrival_s <= now_s:
            scheduler.add(pending.pop(0))
        step = advance(scheduler, now_s)
        now_s += 0.01 + 0.001 * step.num_tokens
        for each in scheduler.waiting:
            waited[id(each)] = waited.get(id(each), 0) + 1
    for each in everyone:
        mine = terms[id(each)]
        ahead = sum(
            other.num_prompt_tokens + other.num_output_tokens
            for other in requests
            if other.arrival_s <= mine.arrival_s + lead_s(policy, mine, other)
        )
        assert waited.get(id(each), 0) <= ahead


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 5), requests=REQUESTS, budget=st.integers(5, 40))
def test_prefill_first_bounds_the_stall_of_a_decode(
    most: int, requests: list[WorkloadRequest], budget: int
) -> None:
    requests.sort(key=lambda r: r.arrival_s)
    config = SchedulerConfig(5, budget, 4, 2000, policy=PrefillFirst(most))
    last: dict[str, int] = {}  # number of the step that gave a request its last token
    number = 0

    def watch(start_s: float, end_s: float, step: Step) -> None:
        nonlocal number
        number += 1
        assert not (step.decodes and step.chunks)
        for each in step.sampled:
            assert number - last.get(each.request_id, number) <= most + 1
            last[each.request_id] = number

    simulate(Workload("w", tuple(requests)), config, H200_LIKE, on_step=watch)


# ---- what the policies are for -------------------------------------------------------------


def test_iteration_level_batching_beats_static_and_chunking_bounds_the_stalls() -> None:
    workload = azure_conversation(400, seed=1, rate_per_s=18.0)
    results = {
        (policy, chunked): simulate(
            workload,
            SchedulerConfig(
                max_num_seqs=256,
                num_blocks=30_000,
                policy=policy,
                enable_chunked_prefill=chunked,
                max_num_batched_tokens=1024,
            ),
            H200_LIKE,
        )
        for policy in ("static", "fcfs", "prefill_first")
        for chunked in (True, False)
    }
    chat = SLO(0.5, 0.05)
    static, chunks = results["static", True], results["fcfs", True]
    whole, v0 = results["fcfs", False], results["prefill_first", False]
    assert chunks.summary().ttft_s.p50 < 0.1 * static.summary().ttft_s.p50
    assert chunks.score(chat).goodput_per_s > 5 * static.score(chat).goodput_per_s
    assert chunks.steps.utilisation > static.steps.utilisation
    # Stalls: bounded by the budget, then by the longest prompt, then by many prompts in a row.
    longest = [run.summary().itl_s.max for run in (chunks, whole, v0)]
    assert longest == sorted(longest) and longest[2] > 5 * longest[0]
    assert v0.summary().ttft_s.p50 < chunks.summary().ttft_s.p50  # what v0's order is good for


def test_least_slack_meets_more_deadlines_under_overload() -> None:
    pick = random.Random(1)
    workload = azure_conversation(500, seed=2, rate_per_s=32.0).map(
        lambda r: replace(r, slo=SLO(1.0 if pick.random() < 0.5 else 10.0, 0.2))
    )
    attained = {}
    for policy in ("fcfs", "least_slack"):
        config = SchedulerConfig(max_num_seqs=64, num_blocks=30_000, policy=policy)
        outputs = simulate(workload, config, H200_LIKE).outputs
        met = sum(meets(o, r.slo) for o, r in zip(outputs, workload, strict=True) if r.slo)
        attained[policy] = met / len(workload)
    assert attained["least_slack"] > attained["fcfs"] + 0.1


def test_the_watermark_trades_time_to_first_token_for_preemptions() -> None:
    # The effect of vLLM PR 44594, in the simulator.
    workload = azure_conversation(400, seed=3, rate_per_s=30.0)
    summaries = [
        simulate(
            workload,
            SchedulerConfig(max_num_seqs=256, num_blocks=3000, watermark=watermark),
            H200_LIKE,
        ).summary()
        for watermark in (0.0, 0.2)
    ]
    assert summaries[0].num_preemptions > 5 * max(1, summaries[1].num_preemptions)
    assert summaries[1].ttft_s.p50 > summaries[0].ttft_s.p50
    assert summaries[1].itl_s.p99 < summaries[0].itl_s.p99


# ---- cost ----------------------------------------------------------------------------------


def calls(work: Callable[[], object]) -> int:
    """Python and C calls that ``work`` makes: a cost that no other process can disturb."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "policy",
    [FCFS(), Static(), PrefillFirst(), Priority(), LeastSlack(token_s=1e-5, step_s=0.005)],
    ids=lambda p: p.name,
)
def test_a_step_costs_no_more_than_linearly(policy: Policy) -> None:
    def cost(num_seqs: int) -> float:
        """Calls per step over 32 steps: decodes, growth, and a long prompt beside them."""
        scheduler = make(
            policy,
            block_size=16,
            num_blocks=num_seqs * 20,
            max_num_seqs=num_seqs + 1,
            max_num_batched_tokens=num_seqs * 24,
        )
        for i in range(num_seqs):
            scheduler.add(request(f"r{i}", 8 + i % 16, max_tokens=99))
        advance(scheduler)
        scheduler.add(request("long", 20 * num_seqs, 1))
        for i in range(num_seqs):  # a queue behind it
            scheduler.add(request(f"w{i}", 8, 1))
        tokens = [50] * 4 * num_seqs

        def steps() -> None:
            for now in range(32):
                scheduler.update(step := scheduler.schedule(float(now)), tokens, float(now))
                assert not step.preempted

        return calls(steps) / 32

    small, large = cost(64), cost(512)
    assert large <= 8 * small * 1.15
    assert large / 512 < 12


def test_admission_of_a_burst_is_linear_too() -> None:
    def cost(num_seqs: int) -> int:
        scheduler = make("fcfs", max_num_seqs=num_seqs, num_blocks=8 * num_seqs)
        for i in range(num_seqs):
            scheduler.add(request(f"r{i}", 3, 1))
        return calls(lambda: scheduler.schedule(0.0))

    assert cost(512) <= 8 * cost(64) * 1.15


# ---- scores --------------------------------------------------------------------------------


def output(ttft_s: float | None, itl_s: list[float], reason: str = "length") -> RequestOutput:
    tpot_s = sum(itl_s) / len(itl_s) if itl_s else None
    metrics = RequestMetrics(ttft_s, tpot_s, itl_s, None, None)
    return RequestOutput("r", [1], [7] * (1 + len(itl_s)), "", reason, None, metrics)


def test_one_run_under_three_definitions() -> None:
    slo = SLO(1.0, 0.1)
    cases: list[tuple[RequestOutput, tuple[bool, bool, bool]]] = [
        (output(0.5, [0.05, 0.1, 0.1]), (True, True, True)),
        (output(0.5, [0.01, 0.2, 0.01]), (True, False, True)),  # a stall, paid for by lead
        (output(1.0, [0.2, 0.05, 0.01]), (True, False, False)),  # the same without lead
        (output(0.5, [0.2, 0.2, 0.2]), (False, False, True)),  # slow, but TTFT left time
        (output(1.1, [0.01, 0.01]), (False, False, False)),
        (output(1.0, []), (True, True, True)),
        (output(0.5, [0.01], "error"), (False, False, False)),
        (output(None, []), (False, False, False)),
    ]
    names: list[SLODefinition] = ["tpot", "itl", "pace"]
    for case, expected in cases:
        assert tuple(meets(case, slo, name) for name in names) == expected, case.metrics
    outputs = [case for case, _ in cases]
    scores = [score(outputs, slo, 4.0, name) for name in names]
    assert [s.num_met for s in scores] == [4, 2, 4]
    assert scores[0].goodput_per_s == 1.0 and scores[1].attainment == 0.25
    with pytest.raises(ValueError, match="tpot, itl or pace"):
        meets(outputs[0], slo, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="duration_s"):
        score(outputs, slo, 0.0)


def test_mlperf_presets_and_their_percentile() -> None:
    assert MLPERF_SLOS["llama2-70b-interactive"] == SLO(0.45, 0.04)
    assert MLPERF_SLOS["llama2-70b"] == SLO(2.0, 0.2)
    assert MLPERF_SLOS["llama3.1-8b-interactive"] == SLO(0.5, 0.03)
    slo = MLPERF_SLOS["llama2-70b"]
    good, late = output(1.0, [0.1]), output(9.0, [0.1])
    assert passes_mlperf([good] * 300 + [late], slo)  # 1 of 301 is beyond the 99th percentile
    assert not passes_mlperf([good] * 30 + [late], slo)
    assert not passes_mlperf([good] * 300 + [output(1.0, [0.1], "error")], slo)
    assert not passes_mlperf([good] * 30 + [output(1.0, [9.9])], slo)
    assert passes_mlperf([output(1.0, [])], slo) and not passes_mlperf([], slo)
