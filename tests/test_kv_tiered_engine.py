"""The engine over tiers: evicted blocks come back, and what does not is computed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeStore, HashModel, expected_tokens

from ch15_helpers import Engine, EngineConfig, RequestOutput, SamplingParams
from ch15_helpers.kv.tiers import TierConfig
from ch15_helpers.serving.engine import StepRecord
from ch15_helpers.serving.offload import Offload
from ch15_helpers.serving.request import RequestStatus

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer


def tiered(model: HashModel | None = None, **how: Any) -> tuple[Engine, FakeStore]:
    ticks = itertools.count()
    store_options = {name: how.pop(name) for name in ("delay", "fails") if name in how}
    settings = {
        "block_size": 4,
        "num_blocks": 12,
        "watermark": 0.0,
        "enable_prefix_caching": True,
        **how,
    }
    engine = Engine(
        model or HashModel(),  # type: ignore[arg-type]
        EngineConfig(**settings),
        clock=lambda: float(next(ticks)),
    )
    store = FakeStore(engine.cache, **store_options)
    engine.offload = engine.runner.offload = Offload(store, engine.scheduler)
    return engine, store


def drain(engine: Engine, limit: int = 500) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    for _ in range(limit):
        if not engine.has_unfinished:
            return outputs
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_invariants()
    raise AssertionError("no progress")


FIRST, SECOND = list(range(20)), list(range(50, 90))


def fill(engine: Engine) -> None:
    """Compute FIRST, then let SECOND push its blocks out of the pool."""
    engine.generate([FIRST], SamplingParams(max_tokens=1))
    engine.generate([SECOND], SamplingParams(max_tokens=1))


def test_evicted_blocks_come_back() -> None:
    engine, store = tiered()
    fill(engine)
    assert len(store.blocks) >= 3
    (output,) = engine.generate([FIRST], SamplingParams(max_tokens=5))
    assert output.token_ids == expected_tokens(FIRST, 5)
    assert output.metrics.num_cached_tokens == 16
    prefix = engine.scheduler.residency.prefix
    assert prefix is not None and prefix.stats.promoted_tokens >= 8


def test_others_run_while_a_request_is_loading() -> None:
    engine, store = tiered(delay=6, num_blocks=14)
    fill(engine)
    other = engine.add_request([1, 2], SamplingParams(max_tokens=10))
    engine.step()
    name = engine.add_request(FIRST, SamplingParams(max_tokens=2))
    engine.step()
    request = engine.scheduler.get(name)
    assert request is not None and request.status is RequestStatus.LOADING
    records: list[StepRecord] = []
    engine.on_step = records.append
    outputs = drain(engine)
    assert outputs[name].token_ids == expected_tokens(FIRST, 2)
    assert outputs[other].token_ids == expected_tokens([1, 2], 10)
    assert store.num_waits == 0, "the engine waited although it had something to do"
    alone = [r for r in records if not r.step.chunks and len(r.step.decodes) == 1]
    assert len(alone) >= 4, "the other request did not decode meanwhile"


def test_with_nothing_else_to_do_it_waits_once() -> None:
    engine, store = tiered(delay=10**9)
    fill(engine)
    steps = engine.num_steps
    (output,) = engine.generate([FIRST], SamplingParams(max_tokens=2))
    assert output.token_ids == expected_tokens(FIRST, 2)
    assert store.num_waits == 1 and engine.num_steps - steps <= 4


@pytest.mark.parametrize("lost", ["all", "the second", "the first"])
def test_blocks_that_do_not_arrive_are_computed(lost: str) -> None:
    numbers = itertools.count()
    wanted = {"all": lambda n: True, "the second": lambda n: n == 1, "the first": lambda n: n == 0}
    engine, _ = tiered(fails=lambda: wanted[lost](next(numbers)))
    fill(engine)
    (output,) = engine.generate([FIRST], SamplingParams(max_tokens=5))
    assert output.token_ids == expected_tokens(FIRST, 5) and next(numbers) > 0
    (again,) = engine.generate([FIRST], SamplingParams(max_tokens=5))
    assert again.token_ids == output.token_ids, "a block that never came was cached"
    engine.check_invariants()


def test_blocks_of_an_aborted_load_are_free_when_it_has_ended() -> None:
    engine, _ = tiered(delay=3)
    fill(engine)
    name = engine.add_request(FIRST, SamplingParams(max_tokens=2))
    step = engine.scheduler.schedule(0.0)
    engine.runner.run(step)
    engine.scheduler.update(step, [], 0.0)
    assert step.promotions
    assert engine.abort(name)
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used > 0, "somebody writes to these blocks"
    again = engine.add_request(FIRST, SamplingParams(max_tokens=2), name)
    outputs = drain(engine)
    assert outputs[again].token_ids == expected_tokens(FIRST, 2)
    engine.close()
    assert engine.scheduler.blocks.allocator.num_used == 0
    engine.check_invariants()


@pytest.mark.parametrize("before", [True, False], ids=["before the loads", "in the model"])
def test_a_failed_step_strands_nobody_who_is_loading(before: bool) -> None:
    model = HashModel()
    engine, store = tiered(model, delay=2, num_blocks=14)
    fill(engine)
    other = engine.add_request([1, 2], SamplingParams(max_tokens=10))
    engine.step()
    name = engine.add_request(FIRST, SamplingParams(max_tokens=3))
    if before:
        demote = store.demote

        def broken(*_: Any) -> None:
            store.demote = demote  # type: ignore[method-assign]
            raise RuntimeError("injected")

        store.demote = broken  # type: ignore[method-assign]
    else:
        model.failures = 1
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs[other].finish_reason == "error"
    engine.check_invariants()
    outputs = drain(engine)
    assert outputs[name].token_ids == expected_tokens(FIRST, 3)


def test_a_decode_gives_way_to_loads_instead_of_failing() -> None:
    engine, _ = tiered(delay=4)
    fill(engine)
    other = engine.add_request([1, 2, 3], SamplingParams(max_tokens=30))
    for _ in range(19):
        engine.step()  # it holds six of the twelve blocks, the last one almost full
    name = engine.add_request([*FIRST, 91, 92], SamplingParams(max_tokens=2))
    outputs = drain(engine)
    assert outputs[other].token_ids == expected_tokens([1, 2, 3], 30)
    assert outputs[name].token_ids == expected_tokens([*FIRST, 91, 92], 2)


def test_tiers_need_the_prefix_cache() -> None:
    with pytest.raises(ValueError, match="enable_prefix_caching"):
        Engine(HashModel(), EngineConfig(num_blocks=4, tiers=TierConfig(host_blocks=4)))  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["host", "host and disk", "disk"])
def test_smollm2_over_real_tiers(smollm2: Transformer, tier: str, tmp_path: Path) -> None:
    """Conversations take turns over a pool that holds one of them; then the engine starts anew."""
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    texts = [
        "The capital of France is Paris. It lies on the river Seine, and it is known for",
        "Water boils at one hundred degrees. At the top of a mountain it boils at",
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    plain = Engine(smollm2, EngineConfig(block_size=4, num_blocks=100))
    expected = [o.token_ids for o in plain.generate(prompts, params)]
    config = TierConfig(
        host_blocks=0 if tier == "disk" else 8 if "disk" in tier else 40,
        disk_dir=str(tmp_path / "kv") if "disk" in tier else None,
        disk_blocks=60 if "disk" in tier else 0,
    )

    def serve() -> tuple[list[list[int]], int]:
        engine = Engine(
            smollm2,
            EngineConfig(block_size=4, num_blocks=8, enable_prefix_caching=True, tiers=config),
        )
        tokens, promoted = [], 0
        for _ in range(2):
            tokens += [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
        prefix = engine.scheduler.residency.prefix
        assert prefix is not None
        promoted = prefix.stats.promoted_tokens
        engine.close()
        engine.check_invariants()
        return tokens, promoted

    tokens, promoted = serve()
    assert tokens == expected * 2 and promoted >= 16
    if "disk" in tier:
        damaged = sorted((tmp_path / "kv").glob("*.kv"))
        damaged[0].write_bytes(damaged[0].read_bytes()[:-5] + b"wrong")
        tokens, promoted = serve()
        assert tokens == expected * 2 and promoted > 0
