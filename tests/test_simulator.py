"""The simulator is the engine with another clock: shown on an engine whose clock is a model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes import HashModel, expected_tokens

from ch15_helpers.serving.config import EngineConfig, SchedulerConfig
from ch15_helpers.serving.distributions import Gamma, LogNormal, Poisson, Uniform
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.loadgen import SkippingClock, StepRecorder, run_workload
from ch15_helpers.serving.policy import (
    FCFS,
    LeastSlack,
    Policy,
    PrefillFirst,
    Priority,
    Static,
)
from ch15_helpers.serving.request import SLO, Request, SamplingParams
from ch15_helpers.serving.runs import MeasuredRun, ModelledRun
from ch15_helpers.serving.simulator import Simulator, request_of, simulate
from ch15_helpers.serving.step import Step
from ch15_helpers.serving.step_time import StepFeatures, StepTimeModel, features_of
from ch15_helpers.serving.validation import validate_simulator
from ch15_helpers.serving.workload import (
    Workload,
    WorkloadRequest,
    azure_conversation,
    synthetic,
)

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer

TICK = 2.0**-20  # times are multiples of it, so that sums are exact in any order
MODEL = StepTimeModel(
    constant_s=5000 * TICK,
    prefill_token_s=20 * TICK,
    prefill_pair_s=TICK,
    chunk_s=300 * TICK,
    decode_s=40 * TICK,
    context_token_s=2 * TICK,
    moved_block_s=100 * TICK,
    fitted_on="made up",
)
H200_LIKE = StepTimeModel(0.005, 1.8e-5, 2e-11, 0.0, 2e-5, 3e-8)


class ModelClock:
    """A clock that only moves as the step-time model says."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def drive(self, engine: Engine) -> Engine:
        """Make the engine's steps take what the model says; the model still runs."""
        run = engine.runner.run

        def timed(step: Step) -> list[int]:
            tokens = run(step)
            self.now_s += MODEL.step_s(features_of(step, updated=False))
            return tokens

        engine.runner.run = timed  # type: ignore[method-assign]
        return engine


def on_ticks(workload: Workload) -> Workload:
    return workload.map(
        lambda r: replace(r, arrival_s=round(r.arrival_s / TICK) * TICK)  # still in order
    )


def latencies(run: MeasuredRun | ModelledRun) -> list[object]:
    return [(o.metrics, len(o.token_ids), o.finish_reason, o.error) for o in run.outputs]


POLICIES: list[Policy] = [
    FCFS(),
    Static(),
    PrefillFirst(max_prefill_steps=2),
    Priority(ageing_s=0.5),
    LeastSlack(default_slo=SLO(0.2, 0.02), max_overdue_s=0.5, token_s=20 * TICK, step_s=0.005),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 200},
        {"num_blocks": 24},  # preempts
        {"num_blocks": 24, "preemption": "swap", "num_host_blocks": 20},
        {"num_blocks": 200, "enable_chunked_prefill": False, "max_num_seqs": 4},
    ],
    ids=["roomy", "tight", "swap", "whole prompts"],
)
def test_with_the_right_step_times_the_simulator_equals_the_engine(
    policy: Policy, limits: dict[str, Any]
) -> None:
    workload = on_ticks(synthetic("w", Gamma(40.0, 2.0), Uniform(1, 60), Uniform(1, 30), 30, 4))
    workload = workload.map(lambda r: replace(r, priority=r.num_prompt_tokens % 3))
    defaults: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 48}
    config = EngineConfig(**{**defaults, **limits}, policy=policy, watermark=0.05)
    clock = ModelClock()
    model = HashModel()
    engine = clock.drive(Engine(model, config, clock=clock))  # type: ignore[arg-type]
    recorder = StepRecorder()
    measured = run_workload(engine, workload, recorder=recorder, wait=clock.wait)
    modelled = simulate(workload, engine.scheduler.config, MODEL)
    assert latencies(modelled) == latencies(measured)
    assert modelled.steps == measured.steps and modelled.duration_s == measured.duration_s
    if limits["num_blocks"] == 24:
        assert measured.summary().num_preemptions > 0
    # The run was real all the same.
    for index, output in enumerate(measured.outputs):
        prompt = workload.prompt(index, model.config.vocab_size)
        assert output.token_ids == expected_tokens(prompt, len(output.token_ids))
    # And from the measured steps the model is found again.
    fitted = StepTimeModel.fit(recorder.features, recorder.seconds, "the clock")
    assert fitted.report(recorder.features, recorder.seconds).p90_abs < 1e-9


def test_validation_on_a_real_model_finds_no_error_when_the_step_times_are_exact(
    tiny: Transformer,
) -> None:
    config = EngineConfig(block_size=4, num_blocks=200, max_num_batched_tokens=48)
    clock = ModelClock()

    def make() -> Engine:
        clock.now_s = 0.0
        return clock.drive(Engine(tiny, config, clock=clock))

    fit, *tests = (
        on_ticks(synthetic(f"w{s}", Poisson(rate), Uniform(1, 70), Uniform(1, 20), 20, s))
        for s, rate in ((1, 50.0), (2, 20.0), (3, 90.0))
    )
    found = validate_simulator(make, [fit], tests, "tiny", wait=clock.wait, warm_up=False)
    assert found.worst < 1e-6 and found.fit.p90_abs < 1e-9
    assert found.model.fitted_on == "tiny"
    assert found.model.prefill_pair_s == pytest.approx(MODEL.prefill_pair_s)
    for each in found.comparisons:
        assert each.modelled.kind == "modelled" and each.measured.kind == "measured"
        assert abs(each.throughput) < 1e-6 and each.steps.p90_abs < 1e-9
    with pytest.raises(ValueError, match="fitted on"):
        validate_simulator(make, [fit], [fit], "tiny", wait=clock.wait, warm_up=False)


def random_case(seed: int) -> tuple[Workload, SchedulerConfig]:
    pick = random.Random(seed)
    workload = synthetic(
        "random",
        Gamma(pick.choice([1.0, 10.0, 50.0]), pick.choice([0.5, 1.0, 3.0])),
        LogNormal(pick.choice([20, 200]), 1.0, 900),
        LogNormal(pick.choice([5, 80]), 1.0, 400),
        60,
        seed,
    ).map(
        lambda r: replace(
            r,
            priority=pick.randint(0, 3),
            slo=pick.choice([None, SLO(0.1, 0.02), SLO(1.0, 0.01)]),
        )
    )
    return workload, SchedulerConfig(
        max_num_seqs=pick.choice([1, 4, 32, 256]),
        max_num_batched_tokens=pick.choice([16, 64, 512, 4096]),
        block_size=pick.choice([1, 4, 16]),
        num_blocks=pick.choice([100, 300, 5000]),
        num_host_blocks=pick.choice([0, 500]),
        preemption=pick.choice(["swap", "recompute"]),
        enable_chunked_prefill=pick.choice([True, False]),
        watermark=pick.choice([0.0, 0.01, 0.2]),
        policy=pick.choice([*POLICIES, PrefillFirst(), LeastSlack(max_overdue_s=0.0)]),
    )


@pytest.mark.parametrize("block", range(4))
def test_skipping_over_equal_steps_changes_nothing(block: int) -> None:
    skipped = preempted = 0
    for seed in range(10 * block, 10 * block + 10):
        workload, config = random_case(seed)
        quick = simulate(workload, config, H200_LIKE)
        assert quick == simulate(workload, config, H200_LIKE, fast_forward=False)
        preempted += quick.summary().num_preemptions
        ended: list[float] = []
        logged = simulate(
            workload,
            config,
            H200_LIKE,
            on_step=lambda start, end, step, ended=ended: ended.append(end),  # type: ignore[misc]
        )
        assert logged == quick and len(ended) == quick.steps.num_steps
        assert ended == sorted(ended)
        skipped += quick.steps.num_steps
    assert skipped > 0 and preempted > 0


def test_skipping_is_worth_it_and_sound_inside() -> None:
    workload = azure_conversation(40, seed=1, rate_per_s=2.0)
    config = SchedulerConfig(num_blocks=4000)
    skipping, stepping = (Simulator(config, H200_LIKE, fast_forward=on) for on in (True, False))
    for index, each in enumerate(workload):
        for simulator in (skipping, stepping):
            # Also in the middle of a run of equal steps, where nobody arrives.
            for until_s in (each.arrival_s - 0.04, each.arrival_s):
                simulator.advance(until_s)
                simulator.scheduler.check_invariants()
            simulator.add(request_of(each, index))
        free = [s.scheduler.blocks.allocator.num_free for s in (skipping, stepping)]
        assert free[0] == free[1]
    skipping.advance()
    assert not skipping.has_work
    assert skipping.num_events < 0.3 * skipping.totals.num_steps


def test_ten_thousand_requests_take_seconds() -> None:
    # The promise is 2 s on an idle core; CPU time, with room for caches that others use too.
    workload = azure_conversation(10_000, seed=1, rate_per_s=5.53)
    config = SchedulerConfig(max_num_seqs=256, num_blocks=30_000)
    start_s = time.process_time()
    run = simulate(workload, config, H200_LIKE)
    assert time.process_time() - start_s < 4.0
    assert run.steps.num_steps > 100_000 and run.summary().num_completed == 10_000


def test_a_step_under_way_is_not_visible_before_it_ends() -> None:
    simulator = Simulator(SchedulerConfig(), StepTimeModel(1.0))
    request = Request("a", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True), 0.25)
    simulator.advance(0.25)
    simulator.add(request)
    assert simulator.now_s == 0.25
    assert simulator.advance(1.0) == [] and request.token_times_s == []
    late = Request("b", [1], SamplingParams(max_tokens=1, ignore_eos=True), 1.0)
    simulator.add(late)  # while a's prompt is under way: it has to wait for the next step
    assert simulator.advance(1.25) == [] and request.token_times_s == [1.25]
    assert simulator.advance(10.0) == [request, late]
    assert request.token_times_s == [1.25, 2.25] and late.token_times_s == [2.25]
    assert simulator.now_s == 2.25 and not simulator.has_work


def test_refused_requests_come_out() -> None:
    workload = Workload("w", (WorkloadRequest(0.0, 100, 1), WorkloadRequest(1.0, 5, 2)))
    run = simulate(workload, SchedulerConfig(block_size=4, num_blocks=10), StepTimeModel(0.5))
    assert [o.finish_reason for o in run.outputs] == ["error", "length"]
    assert "needs 25 KV blocks" in str(run.outputs[0].error)
    assert run.duration_s == 2.0 and run.summary().num_completed == 1


def test_a_policy_that_admits_nobody_is_an_error_not_a_hang() -> None:
    class Never(FCFS):
        def next_index(self, waiting: object, num_running: int, now_s: float) -> int:
            return -1

    workload = synthetic("w", Poisson(1.0), Uniform(1, 2), Uniform(1, 2), 2)
    with pytest.raises(RuntimeError, match="admits none of 1 waiting"):
        simulate(workload, SchedulerConfig(policy=Never()), StepTimeModel(1.0))


def test_simulated_results_are_the_same_every_time_and_say_what_they_are() -> None:
    workload, config = random_case(3)
    first, second = (simulate(workload, config, MODEL) for _ in range(2))
    assert first == second
    assert isinstance(first, ModelledRun) and first.kind == "modelled"
    assert first.fitted_on == "made up"
    assert 0 < first.steps.utilisation <= 1
    assert first.steps.busy_s <= first.duration_s * (1 + 1e-9)


# ---- step times ----------------------------------------------------------------------------


def random_features(count: int, seed: int) -> list[StepFeatures]:
    rng = np.random.default_rng(seed)
    return [
        StepFeatures(*(int(v) for v in rng.integers(0, [500, 90_000, 4, 64, 50_000, 9])))
        for _ in range(count)
    ]


def test_fit_finds_the_coefficients_and_reports_the_noise() -> None:
    features = random_features(400, 1)
    rng = np.random.default_rng(2)
    seconds = [MODEL.step_s(f) * rng.lognormal(0.0, 0.05) for f in features]
    fitted = StepTimeModel.fit(features, seconds, "noise")
    for name in ("prefill_token_s", "prefill_pair_s", "decode_s", "context_token_s"):
        assert getattr(fitted, name) == pytest.approx(getattr(MODEL, name), rel=0.25), name
    report = fitted.report(features, seconds)
    assert report.num_steps == 400
    assert report.median_abs == pytest.approx(0.05 * 0.674, rel=0.2)
    assert abs(report.bias) < 0.01 and abs(report.total) < 0.02
    fresh = random_features(200, 3)
    exact = [MODEL.step_s(f) for f in fresh]
    assert fitted.report(fresh, exact).p90_abs < 0.02


def test_fit_is_the_non_negative_optimum() -> None:
    features = random_features(60, 5)
    rng = np.random.default_rng(6)
    seconds = rng.uniform(0.01, 0.1, 60).tolist()  # unrelated: unconstrained fits go negative

    def loss(model: StepTimeModel) -> float:
        ratios = [model.step_s(f) / s - 1 for f, s in zip(features, seconds, strict=True)]
        return float(np.square(ratios).sum())

    best = StepTimeModel.fit(features, seconds, "x")
    names = [name for name in best.to_dict() if name != "fitted_on"]
    assert min(getattr(best, name) for name in names) == 0.0
    for name in names:  # no step in any allowed direction helps
        value = getattr(best, name)
        for other in (value * 0.99, value * 1.01 + 1e-9):
            assert loss(replace(best, **{name: other})) >= loss(best) * (1 - 1e-9)


def test_terms_that_never_occur_are_left_out() -> None:
    features = [StepFeatures(0, 0, 0, n, 100 * n + 7, 0) for n in range(1, 30)]
    fitted = StepTimeModel.fit(features, [MODEL.step_s(f) for f in features], "decodes")
    assert fitted.prefill_token_s == fitted.chunk_s == fitted.moved_block_s == 0.0
    assert fitted.report(features, [MODEL.step_s(f) for f in features]).p90_abs < 1e-9


def test_models_survive_json() -> None:
    odd = replace(MODEL, constant_s=0.1 + 0.2, decode_s=1 / 3)
    assert StepTimeModel.from_json(odd.to_json()) == odd
    with pytest.raises(ValueError, match="unknown fields"):
        StepTimeModel.from_dict({"constant_s": 1.0, "turbo": 2})
    with pytest.raises(ValueError, match="constant_s is missing"):
        StepTimeModel.from_dict({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepTimeModel(-1.0), "constant_s"),
        (lambda: StepTimeModel(1.0, decode_s=float("nan")), "decode_s"),
        (lambda: StepTimeModel(0.0), "all coefficients are 0"),
        (lambda: StepTimeModel.fit([], [], ""), "0 steps"),
        (lambda: StepTimeModel.fit(random_features(2, 0), [1.0, 0.0], ""), "positive"),
    ],
)
def test_impossible_models_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_decode_steps_cost_the_same_by_either_way() -> None:
    for f in random_features(50, 7):
        decode = StepFeatures(0, 0, 0, f.num_decodes, f.decode_context, 0)
        assert H200_LIKE.decode_step_s(f.num_decodes, f.decode_context) == H200_LIKE.step_s(decode)


# ---- the load generator --------------------------------------------------------------------


def test_latencies_count_from_the_planned_arrival_and_lag_is_reported() -> None:
    clock = ModelClock()
    config = EngineConfig(block_size=4, num_blocks=200)
    engine = clock.drive(Engine(HashModel(), config, clock=clock))  # type: ignore[arg-type]
    step_s = 2 * MODEL.constant_s  # b is planned into the middle of a's prompt
    a, b = WorkloadRequest(0.0, 40, 2), WorkloadRequest(step_s / 2, 4, 1)
    prompt_s = MODEL.step_s(StepFeatures(40, 820, 1, 0, 0, 0))
    run = run_workload(engine, Workload("w", (a, b)), wait=clock.wait)
    assert run.lag_s == [0.0, prompt_s - step_s / 2]
    second_s = MODEL.step_s(StepFeatures(4, 10, 1, 1, 41, 0))
    assert run.outputs[1].metrics.ttft_s == prompt_s + second_s - step_s / 2
    assert run.lag.max == run.lag_s[1]
    engine.add_request([1, 2])
    with pytest.raises(ValueError, match="idle"):
        run_workload(engine, Workload("w", (a,)))


def test_a_slow_client_cannot_hide_queueing() -> None:
    # The client stalls for a second before it submits the second request.
    clock = ModelClock()
    config = EngineConfig(block_size=4, num_blocks=200)
    engine = clock.drive(Engine(HashModel(), config, clock=clock))  # type: ignore[arg-type]
    add = engine.add_request

    def slow(*args: Any, **kwargs: Any) -> str:
        clock.now_s += 1.0
        return add(*args, **kwargs)

    engine.add_request = slow  # type: ignore[method-assign]
    requests = (WorkloadRequest(0.0, 4, 1), WorkloadRequest(0.0, 4, 1))
    run = run_workload(engine, Workload("w", requests), wait=clock.wait)
    assert run.lag_s == [1.0, 2.0]
    assert min(o.metrics.ttft_s or 0.0 for o in run.outputs) > 2.0


def test_skipping_clock_adds_what_is_waited_for() -> None:
    base = iter([1.0, 2.0, 3.0])
    clock = SkippingClock(lambda: next(base))
    assert clock() == 1.0
    clock.wait(10.0)
    clock.wait(-5.0)
    assert clock() == 12.0 and clock() == 13.0


def test_on_a_real_clock_too(tiny: Transformer) -> None:
    seen: list[int] = []
    engine = Engine(
        tiny, EngineConfig(num_blocks=100), on_step=lambda record: seen.append(record.index)
    )
    before = engine.on_step
    workload = synthetic("w", Poisson(200.0), Uniform(1, 30), Uniform(1, 8), 12, seed=1)
    start = time.perf_counter()
    run = run_workload(engine, workload)
    assert time.perf_counter() - start >= workload.requests[-1].arrival_s  # it waited
    assert len(seen) == run.steps.num_steps and engine.on_step is before
    for output, request in zip(run.outputs, workload, strict=True):
        assert len(output.token_ids) == request.num_output_tokens
        assert output.finish_reason == "length" and (output.metrics.ttft_s or 0) > 0
    assert min(run.lag_s) >= 0.0
