"""Random use of the whole engine over a model whose tokens depend on every cached token.

Admit, step, abort, fork and failing steps in any order, over every scheduling mode and pools so
small that preemption is the rule: whatever finishes must have exactly the tokens that the hash
gives, and when all is done both pools must be empty.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from fakes import VOCAB, FakeStore, HashModel, expected_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.kv.tiers import TierConfig, TieredStore
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import Engine, StepRecord
from ch15_helpers.serving.offload import Offload
from ch15_helpers.serving.request import RequestOutput, SamplingParams

MODEL_LEN = 60


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 2, 4, 5]),
        num_blocks=st.sampled_from([4, 9, 14, 24]),
        max_num_seqs=st.sampled_from([1, 2, 4, 6]),
        budget=st.sampled_from([1, 5, 12, 30]),
        chunked=st.booleans(),
        preemption=st.sampled_from(["recompute", "swap"]),
        num_host_blocks=st.sampled_from([0, 3, 12]),
        watermark=st.sampled_from([0.0, 0.01, 0.3]),
        layout=st.sampled_from(["block_major", "layer_major"]),
        eviction=st.sampled_from([None, "lru", "lfu", "fifo", "cost_aware"]),
        tier=st.sampled_from([None, "fake", "host"]),
        ahead=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        chunked: bool,
        preemption: Any,
        num_host_blocks: int,
        watermark: float,
        layout: Any,
        eviction: str | None = None,
        tier: str | None = None,
        ahead: bool = False,
    ) -> None:
        self.model = HashModel(MODEL_LEN)
        self.pool_tokens = block_size * num_blocks
        ticks = itertools.count()
        self.engine = Engine(
            self.model,  # type: ignore[arg-type]
            EngineConfig(
                block_size=block_size,
                num_blocks=num_blocks,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                enable_chunked_prefill=chunked,
                preemption=preemption,
                num_host_blocks=num_host_blocks,
                watermark=watermark,
                kv_layout=layout,
                enable_prefix_caching=eviction is not None,
                eviction_policy=eviction or "lru",
                async_scheduling=ahead,
            ),
            clock=lambda: float(next(ticks)),
        )
        if eviction is not None and tier is not None:
            self.add_tier(tier, num_blocks)
        self.asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self.aborted: set[str] = set()
        self.failed_steps = 0
        self.last: list[int] = []

    def add_tier(self, tier: str, num_blocks: int) -> None:
        """A tier that is slow, loses a block now and then and forgets, or the real one."""
        engine, rng = self.engine, random.Random(num_blocks)
        prefix = engine.scheduler.residency.prefix
        assert prefix is not None
        store: Any
        if tier == "fake":
            store = FakeStore(
                engine.cache, 2 * num_blocks, delay=2, fails=lambda: rng.random() < 0.15
            )
        else:
            config = TierConfig(host_blocks=num_blocks, background=False)
            store = TieredStore(engine.cache, prefix.keys, config)
        engine.offload = engine.runner.offload = Offload(store, engine.scheduler)

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=25),
        max_tokens=st.integers(1, 40),
        stop=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    )
    def admit(self, prompt: list[int], max_tokens: int, stop: list[int]) -> None:
        self.add(prompt, max_tokens, stop)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=25),
        max_tokens=st.integers(1, 40),
        times=st.integers(1, 3),
    )
    def admit_again(self, prompt: list[int], max_tokens: int, times: int) -> None:
        """Prompts that share prefixes, and equal ones in the same step."""
        for _ in range(times):
            self.add(prompt, max_tokens, [])

    @rule(cut=st.integers(0, 8), more=st.lists(st.integers(0, 1), max_size=4))
    @precondition(lambda self: self.last)
    def next_turn(self, cut: int, more: list[int]) -> None:
        """A conversation goes on: prompt and output of one that ended, and a little more."""
        prompt = (self.last[: max(1, len(self.last) - cut)] + more)[: MODEL_LEN - 8]
        self.add(prompt, 8, [])

    def add(self, prompt: list[int], max_tokens: int, stop: list[int]) -> None:
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=tuple(stop))
        self.asked[self.engine.add_request(prompt, params)] = (prompt, params)

    @rule(pick=st.integers(0, 99), max_tokens=st.integers(20, 50), times=st.integers(0, 6))
    @precondition(lambda self: self.asked)
    def fork(self, pick: int, max_tokens: int, times: int) -> None:
        self.step(times)
        running = self.engine.scheduler.running
        decoding = sorted(r.request_id for r in running if r.output_token_ids)
        if not decoding:
            return
        parent = decoding[pick % len(decoding)]
        params = SamplingParams(max_tokens=max_tokens)
        try:
            child = self.engine.fork(parent, params)
        except InvalidRequestError:
            return  # a preempted parent that is still recomputed, or too many run
        self.asked[child] = (self.asked[parent][0], params)

    @rule(pick=st.integers(0, 99))
    @precondition(lambda self: self.asked)
    def abort(self, pick: int) -> None:
        name = sorted(self.asked)[pick % len(self.asked)]
        if self.engine.abort(name):
            self.aborted.add(name)

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.check(self.engine.step())

    @rule(dice=st.integers(1, 4))
    def failing_step(self, dice: int) -> None:
        if dice < 4:  # as often as any other rule, it would leave little to go on with
            return
        self.model.failures = 1
        self.failed_steps += 1
        outputs = self.engine.step()
        self.model.failures = 0
        self.check(outputs)

    def check(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            prompt, params = self.asked.pop(output.request_id)
            expected = expected_tokens(prompt, params.max_tokens, params.stop_token_ids, MODEL_LEN)
            tokens = output.token_ids
            assert output.prompt_token_ids == prompt
            if output.finish_reason in ("stop", "length"):
                assert tokens == expected, f"{output.request_id}: {tokens} != {expected}"
                assert (output.finish_reason == "stop") == (tokens[-1] in params.stop_token_ids)
                assert output.error is None
                self.last = prompt + tokens
            else:
                assert tokens == expected[: len(tokens)]
                assert len(tokens) < len(expected)
                self.check_reason(output, len(prompt) + len(tokens))
            assert len(output.metrics.itl_s) == max(0, len(tokens) - 1)

    def check_reason(self, output: RequestOutput, known: int) -> None:
        if output.finish_reason == "abort":
            assert output.request_id in self.aborted
            return
        assert output.finish_reason == "error" and output.error is not None
        if "injected failure" in output.error:
            assert self.failed_steps
        else:
            assert known > self.pool_tokens, output.error
            assert "KV blocks" in output.error

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_unfinished:
                break
            self.check(self.engine.step())
            self.engine.check_invariants()
        assert not self.asked, f"never ended: {sorted(self.asked)}"
        self.engine.close()
        self.engine.check_invariants()
        assert self.engine.scheduler.blocks.allocator.num_used == 0
        assert self.engine.scheduler.host_blocks.num_used == 0


EngineMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
)
TestEngineMachine = EngineMachine.TestCase


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("seed", range(8))
def test_long_random_walk_in_a_crowded_pool(seed: int, preemption: str, ahead: bool) -> None:
    """The same walk, long and biased to where it is crowded: forks, copies, preemptions, swaps."""
    rng = random.Random(seed)
    walk = EngineMachine()
    walk.start(
        block_size=rng.choice([2, 3, 4]),
        num_blocks=rng.randint(15, 19),
        max_num_seqs=6,
        budget=rng.choice([7, 30]),
        chunked=rng.random() < 0.7,
        preemption=preemption,
        num_host_blocks=rng.choice([12, 24]),
        watermark=0.0,
        layout="block_major",
        eviction=(None, None, "lru", "lfu", "fifo", "cost_aware", "lru", "lru")[seed],
        tier=(None, None, None, None, "fake", "fake", "fake", "host")[seed],
        ahead=ahead,
    )
    seen = {"copies": 0, "preempted": 0, "swap_in": 0, "promotions": 0}

    def count(record: StepRecord) -> None:
        for name in seen:
            seen[name] += len(getattr(record.step, name))

    walk.engine.on_step = count
    for _ in range(1500):
        dice = rng.random()
        if dice < 0.35 and walk.engine.scheduler.num_waiting < 4:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            if rng.random() < 0.3:
                walk.next_turn(rng.randrange(9), [rng.randrange(2)])
            else:
                walk.add(prompt, rng.randint(1, 30), [])
        elif dice < 0.6:
            walk.fork(rng.randrange(99), rng.randint(20, 40), 0)
        elif dice < 0.62 and walk.asked:
            walk.abort(rng.randrange(99))
        elif dice < 0.63:
            walk.failing_step(4)
        else:
            walk.step(1)
        walk.consistent()
    walk.teardown()
    assert seen["copies"] > 5 and seen["preempted"] > 5
    assert (seen["swap_in"] > 5) == (preemption == "swap")
    assert (seen["promotions"] > 5) == (seed >= 4)
