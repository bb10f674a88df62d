"""The prefix cache in the simulator: the engine's hits, exact when it skips, and real traces."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import VOCAB, HashModel

from ch15_helpers.kv.policies import EVICTION_POLICIES, RecomputeCost
from ch15_helpers.kv.replay import replay
from ch15_helpers.serving.config import EngineConfig, SchedulerConfig
from ch15_helpers.serving.content import NamedText
from ch15_helpers.serving.conversations import mooncake_like
from ch15_helpers.serving.distributions import Gamma, LogNormal, Uniform
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.request import Request, SamplingParams
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.simulator import Simulator, request_of, simulate
from ch15_helpers.serving.step_time import StepTimeModel
from ch15_helpers.serving.step_time_data import load_step_time
from ch15_helpers.serving.traces import read_mooncake_jsonl
from ch15_helpers.serving.workload import Workload, multi_turn

H200_LIKE = StepTimeModel(0.005, 1.8e-5, 2e-11, 0.0, 2e-5, 3e-8)
MOONCAKE = Path(__file__).parents[2] / "shared" / "traces" / "mooncake_conversation.jsonl"


def conversations(seed: int, sessions: int = 12) -> Workload:
    return multi_turn(
        Gamma(8.0, 1.5),
        Uniform(1, 5),
        LogNormal(12, 0.7, 60),
        LogNormal(10, 0.7, 40),
        sessions,
        system_tokens=21,
        think_s=0.7,
        seed=seed,
    )


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_skipping_over_equal_steps_changes_nothing(policy: str) -> None:
    evicted = skipped = preempted = 0
    for seed in range(8):
        pick = random.Random(seed)
        workload = conversations(seed)
        config = SchedulerConfig(
            max_num_seqs=pick.choice([2, 8, 64]),
            max_num_batched_tokens=pick.choice([64, 512]),
            block_size=pick.choice([2, 4, 16]),
            num_blocks=pick.choice([60, 120, 300]),
            watermark=pick.choice([0.0, 0.1]),
            policy=pick.choice(["fcfs", "least_slack", "prefill_first"]),
            enable_prefix_caching=True,
            eviction_policy=policy,
            recompute_cost=RecomputeCost(1.0, 0.01),
        )
        quick, slow = (Simulator(config, H200_LIKE, fast_forward=fast) for fast in (True, False))
        for simulator in (quick, slow):
            for index, each in enumerate(workload):
                simulator.advance(each.arrival_s)
                simulator.add(request_of(each, index))
            simulator.advance()
            simulator.scheduler.check_invariants()
        caches = [simulator.scheduler.residency.prefix for simulator in (quick, slow)]
        assert caches[0] is not None and caches[1] is not None
        assert caches[0].stats == caches[1].stats
        assert quick.totals == slow.totals and quick.now_s == slow.now_s
        texts = [{(n.depth, n.content) for n in c.cached.values()} for c in caches if c]
        assert texts[0] == texts[1], "other blocks were evicted"
        result = simulate(workload, config, H200_LIKE)
        assert result == simulate(workload, config, H200_LIKE, fast_forward=False)
        evicted += caches[0].stats.evicted
        preempted += quick.scheduler.num_preemptions
        skipped += slow.num_events - quick.num_events
    assert evicted > 100 and skipped > 100 and preempted > 0


@pytest.mark.parametrize("num_blocks", [40, 400])
@pytest.mark.parametrize("policy", ["lru", "cost_aware"])
def test_the_simulator_finds_what_the_engine_finds(policy: str, num_blocks: int) -> None:
    """The same requests at once: token ids in the engine, named text in the simulator."""
    workload = conversations(3).clipped(120, 20)
    limits: dict[str, Any] = {
        "block_size": 4,
        "num_blocks": num_blocks,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 40,
        "enable_prefix_caching": True,
        "eviction_policy": policy,
        "recompute_cost": RecomputeCost(1.0, 0.05),
    }
    engine = Engine(HashModel(), EngineConfig(**limits))  # type: ignore[arg-type]
    simulator = Simulator(SchedulerConfig(**limits), H200_LIKE)
    for index, each in enumerate(workload):
        # A vocabulary so small repeats itself by chance; ids spread over it by the segment do not.
        prompt = [token % VOCAB for token in workload.prompt(index, 1 << 30)]
        engine.add_request(prompt, each.params, str(index))
        simulated = request_of(each, index)
        simulated.arrival_s = 0.0
        simulator.add(simulated)
    measured: dict[str, int] = {}
    while engine.has_unfinished:
        for output in engine.step():
            measured[output.request_id] = output.metrics.num_cached_tokens
    modelled = {r.request_id.removeprefix("request-"): r.num_cached_tokens
                for r in simulator.advance()}  # fmt: skip
    # Texts that are different in the simulator may begin alike by chance in the engine.
    assert set(measured) == set(modelled)
    near = [abs(measured[name] - modelled[name]) for name in measured]
    assert sum(near) <= 0.02 * sum(modelled.values())
    assert sum(modelled.values()) > 500


def test_caching_shortens_what_is_simulated() -> None:
    workload = conversations(1, 30)
    plain = simulate(workload, SchedulerConfig(num_blocks=4000), H200_LIKE)
    config = SchedulerConfig(num_blocks=4000, enable_prefix_caching=True)
    cached = simulate(workload, config, H200_LIKE)
    found = sum(output.metrics.num_cached_tokens for output in cached.outputs)
    assert cached.steps.num_tokens == plain.steps.num_tokens - found
    assert found > 0.3 * sum(request.num_prompt_tokens for request in workload)


def test_named_text_is_cut_where_asked() -> None:
    text = NamedText([(7, 5), (9, 3)])
    assert len(text) == 8 and list(text[2:4]) == [2, 3] and text[:] is text
    assert text.content(0, 4) == ((7, 0, 4),)
    assert text.content(4, 8) == ((7, 4, 1), (9, 0, 3))
    assert text.content(6, 8) != text.content(5, 7)
    assert text.content(6, 12)[0] == (9, 1, 2) and text.content(6, 12)[1][1:] == (0, 4)
    assert text == NamedText([(7, 5), (9, 3)]) != NamedText([(7, 8)])


def test_synthetic_conversations_reuse_like_conversations() -> None:
    """Hits of an infinite cache, from the segments alone: all that was said before is there."""
    workload = conversations(5, 40)
    size = 4
    prompts = [workload.prompt(i, 1 << 40) for i in range(len(workload))]
    found = replay(prompts, 100_000, block_size=size)
    told: dict[int, int] = {}
    possible = 0
    for each in workload:
        before = told.get(each.session, 21 if told else 0)
        possible += before // size
        told[each.session] = each.num_prompt_tokens
    assert found.hit_blocks == possible


def blocks_of(workload: Workload, size: int = 512) -> list[list[Any]]:
    """What each block of each prompt says, the last one perhaps in part."""
    texts = [(NamedText(r.segments), r.num_prompt_tokens) for r in workload]
    return [[t.content(at, min(at + size, n)) for at in range(0, n, size)] for t, n in texts]


@pytest.fixture(scope="module")
def mooncake() -> list[list[int]]:
    if not MOONCAKE.exists():
        pytest.skip("the Mooncake trace is not here")
    return [[name for name, _ in each.segments] for each in read_mooncake_jsonl(MOONCAKE)]


def test_a_pool_that_fits_exactly_keeps_everything() -> None:
    circle = [[(user, i) for i in range(10)] for _ in range(4) for user in range(8)]
    for policy in EVICTION_POLICIES:
        assert replay(circle, 80, policy=policy).block_hit_rate == 0.75
    assert replay(circle, 70).hit_blocks == 0, "LRU evicts exactly what comes next"


def test_what_hits_are_worth() -> None:
    cost = RecomputeCost(token_s=1.0, pair_s=1.0)
    found = replay([[1, 2, 3], [1, 2, 4]], 10, cost=cost)
    assert (found.saved_s, found.prompt_s) == (2 + 3, 2 * (2 + 3 + 4))


def test_an_infinite_cache_hits_what_mooncake_says(mooncake: list[list[int]]) -> None:
    found = replay(mooncake, 200_000)
    assert found.prompt_blocks == 288_500 and found.evicted == 0
    assert round(100 * found.block_hit_rate, 1) == 36.6


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_mooncake_hit_rate_grows_with_capacity(mooncake: list[list[int]], policy: str) -> None:
    part = mooncake[:2500]
    rates = [
        replay(part, blocks, policy=policy, cost=RecomputeCost(1.0, 0.02)).block_hit_rate
        for blocks in (1_000, 5_000, 20_000, 60_000)
    ]
    assert rates == sorted(rates) and rates[0] < 0.5 * rates[-1]
    assert rates[-1] == replay(part, 200_000).block_hit_rate


def test_made_up_conversations_are_like_mooncake(mooncake: list[list[int]]) -> None:
    trace, made_up = read_mooncake_jsonl(MOONCAKE), mooncake_like(7820, seed=1)
    for tokens in ("prompt_tokens", "output_tokens"):
        real, ours = (getattr(workload.stats, tokens) for workload in (trace, made_up))
        assert ours.mean == pytest.approx(real.mean, rel=0.08)
        assert ours.p50 == pytest.approx(real.p50, rel=0.08)
        assert ours.p95 == pytest.approx(real.p95, rel=0.15)
    prompts = blocks_of(made_up)
    assert replay(prompts, 300_000).block_hit_rate == pytest.approx(0.366, abs=0.01)
    for num_blocks in (10_000, 30_000):
        real_rate, our_rate = (
            replay(each[:6000], num_blocks).block_hit_rate for each in (mooncake, prompts)
        )
        assert our_rate == pytest.approx(real_rate, abs=0.03)
    hour = [r for r in made_up if r.arrival_s < 3537]
    assert len(hour) == pytest.approx(len(trace), rel=0.05)


def test_mooncake_is_simulated_with_the_cache() -> None:
    if not MOONCAKE.exists():
        pytest.skip("the Mooncake trace is not here")
    workload = read_mooncake_jsonl(MOONCAKE, limit=400)
    config = SchedulerConfig(
        block_size=512, num_blocks=6000, max_num_batched_tokens=8192, enable_prefix_caching=True
    )
    cached = simulate(workload, config, H200_LIKE)
    assert sum(output.metrics.num_cached_tokens for output in cached.outputs) > 0


def num_calls(function: Any) -> int:
    count = 0

    def hook(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(hook)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def crowd(caching: bool, num_seqs: int, num_cached: int) -> Scheduler:
    """Decodes beside a cache with ``num_cached`` blocks, and a request that does not fit."""
    size = 16
    config = SchedulerConfig(
        max_num_seqs=num_seqs + 1,
        max_num_batched_tokens=100_000,
        num_blocks=num_cached + 6 * num_seqs + 10,
        watermark=0.0,
        enable_prefix_caching=caching,
    )
    scheduler = Scheduler(config)

    def add(name: str, tokens: list[int], max_tokens: int) -> None:
        scheduler.add(Request(name, tokens, SamplingParams(max_tokens=max_tokens)))

    for number in range(num_cached // 50):
        add(f"old {number}", [number] * 50 * size, 1)
        scheduler.update(scheduler.schedule(0.0), [1], 0.0)
    for number in range(num_seqs):
        add(f"running {number}", [-number] * (8 + number % size), 80)
    step = scheduler.schedule(0.0)
    scheduler.update(step, [1] * len(step.sampled), 0.0)
    add("too large", [7] * size * (num_cached + 5 * num_seqs), 1)
    return scheduler


def steps(scheduler: Scheduler) -> None:
    for now in range(32):
        step = scheduler.schedule(float(now))
        assert not step.preempted and not step.chunks
        scheduler.update(step, [1] * len(step.decodes), float(now))


def test_decode_steps_pay_nothing_for_ten_thousand_cached_blocks() -> None:
    """Counted calls of 32 steps with a blocked queue: the cache's size must not matter."""
    cases = (crowd(False, 64, 0), crowd(True, 64, 500), crowd(True, 64, 10_000))
    plain, small, large = (num_calls(lambda s=s: steps(s)) for s in cases)  # type: ignore[misc]
    assert large <= 1.02 * small + 64
    assert large <= 1.6 * plain


def test_bookkeeping_is_a_fiftieth_of_a_step_at_the_most() -> None:
    """A prompt of 32 cached blocks comes and goes beside 10,000 others: 2 % of the shortest step
    of SmolLM2 on a CPU, least of eight tries, in this process's own time."""
    scheduler = crowd(True, 4, 10_000)
    scheduler.abort("too large")
    tries = []
    for number in range(8):
        scheduler.add(Request(f"new {number}", [5] * 512, SamplingParams(max_tokens=1)))
        start_s = time.process_time()
        step = scheduler.schedule(0.0)
        scheduler.update(step, [1] * len(step.sampled), 0.0)
        tries.append(time.process_time() - start_s)
        assert [chunk.num_tokens for chunk in step.chunks] == [1]
    assert min(tries) < 0.02 * load_step_time("cpu").model.constant_s
