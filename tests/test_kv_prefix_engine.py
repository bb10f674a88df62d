"""The prefix cache in the engine: the same tokens as without it, for less work."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from fakes import HashModel, expected_tokens, next_token

from ch15_helpers import Engine, EngineConfig, RequestOutput, SamplingParams
from ch15_helpers.kv.policies import EVICTION_POLICIES
from ch15_helpers.serving.engine import StepRecord
from ch15_helpers.serving.request import RequestStatus

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer

SYSTEM = (
    "You are a careful assistant who answers in short, plain sentences and never makes up facts. "
)
QUESTIONS = (
    "The capital of France is",
    "The capital of France is not Lyon, it is",
    "Water boils at a temperature of",
    "The capital of Fr",
)


def hash_engine(model: HashModel | None = None, **config: Any) -> Engine:
    ticks = itertools.count()
    settings = {"block_size": 4, "num_blocks": 32, "enable_prefix_caching": True, **config}
    return Engine(
        model or HashModel(),  # type: ignore[arg-type]
        EngineConfig(**settings),
        clock=lambda: float(next(ticks)),
    )


def stats(engine: Engine) -> Any:
    prefix = engine.scheduler.residency.prefix
    assert prefix is not None
    return prefix.stats


def drain(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    return outputs


def converse(engine: Engine, turns: int, params: SamplingParams) -> list[RequestOutput]:
    """Every conversation's next turn is all that was said and a new question."""
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    histories = [tokenizer.encode(SYSTEM + question) for question in QUESTIONS]
    outputs: list[RequestOutput] = []
    for turn in range(turns):
        answers = engine.generate(histories, params)
        outputs += answers
        more = tokenizer.encode(f" And what about number {turn}?")
        histories = [
            history + answer.token_ids + more
            for history, answer in zip(histories, answers, strict=True)
        ]
    return outputs


PLENTY = {"block_size": 8, "num_blocks": 200}
WAYS: dict[str, dict[str, Any]] = {
    "one step": PLENTY,
    "chunks": {**PLENTY, "max_num_batched_tokens": 24},
    "one at a time": {**PLENTY, "max_num_seqs": 1},
    "crowded": {"block_size": 8, "num_blocks": 14, "watermark": 0.0},
    "crowded, swap": {
        "block_size": 8,
        "num_blocks": 14,
        "watermark": 0.0,
        "preemption": "swap",
        "num_host_blocks": 24,
    },
    "small blocks": {"block_size": 2, "num_blocks": 400, "kv_layout": "layer_major"},
}


@pytest.fixture(scope="module")
def without_cache(smollm2: Transformer) -> list[list[int]]:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    engine = Engine(smollm2, EngineConfig(**PLENTY))
    return [output.token_ids for output in converse(engine, 2, params)]


@pytest.mark.parametrize("way", WAYS)
def test_smollm2_conversations_have_the_same_tokens(
    smollm2: Transformer, without_cache: list[list[int]], way: str
) -> None:
    engine = Engine(smollm2, EngineConfig(enable_prefix_caching=True, **WAYS[way]))
    outputs = converse(engine, 2, SamplingParams(max_tokens=10, ignore_eos=True))
    assert [output.token_ids for output in outputs] == without_cache
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    found = stats(engine)
    assert found.lookups == 8
    assert found.hit_tokens == sum(output.metrics.num_cached_tokens for output in outputs) > 0
    if way in ("one step", "chunks"):
        second = outputs[4:]
        kept = [len(o.prompt_token_ids) - o.metrics.num_cached_tokens for o in second]
        assert all(computed <= 8 + 8 for computed in kept), "more than the new text was computed"
    if way == "one at a time":
        assert outputs[1].metrics.num_cached_tokens >= 18, "the system prompt was computed again"
        assert found.copied_tokens > 0, "no prompt went on inside a cached block"
    if way.startswith("crowded"):
        assert found.evicted > 0


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_tiny_model_under_every_policy(tiny: Transformer, policy: str) -> None:
    prompts = [[5, 6, 7, 8] * 5 + [n % 3] * (n % 7 + 1) for n in range(12)]
    params = SamplingParams(max_tokens=9, ignore_eos=True)

    def serve(**config: Any) -> list[list[int]]:
        engine = Engine(tiny, EngineConfig(block_size=4, max_num_seqs=3, **config))
        return [o.token_ids for o in engine.generate(prompts, params)]

    expected = serve(num_blocks=100)
    assert serve(num_blocks=26, enable_prefix_caching=True, eviction_policy=policy) == expected


def test_a_prompt_that_is_all_there_computes_one_token() -> None:
    engine = hash_engine()
    prompt = list(range(16))
    engine.generate([prompt], SamplingParams(max_tokens=1))
    records: list[StepRecord] = []
    engine.on_step = records.append
    (again,) = engine.generate([prompt], SamplingParams(max_tokens=1))
    assert again.token_ids == expected_tokens(prompt, 1)
    assert [r.num_tokens for r in records] == [1] and again.metrics.num_cached_tokens == 15
    assert len(records[0].step.copies) == 1, "the last block is copied, then written to"


def test_a_prompt_that_goes_on_inside_a_block_copies_the_equal_part() -> None:
    engine = hash_engine()
    engine.generate([list(range(16))], SamplingParams(max_tokens=1))
    prompt = [*range(11), 50, 51]
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=3))
    assert output.token_ids == expected_tokens(prompt, 3)
    assert output.metrics.num_cached_tokens == 11 and stats(engine).copied_tokens == 3


def test_equal_requests_in_one_step_end_up_with_the_same_blocks() -> None:
    engine = hash_engine()
    prompt = list(range(12))
    names = [engine.add_request(prompt, SamplingParams(max_tokens=4)) for _ in range(3)]
    engine.step()
    tables = [engine.scheduler.blocks.table(name)[:3] for name in names]
    assert tables[0] == tables[1] == tables[2] and stats(engine).duplicates == 6
    outputs = drain(engine)
    assert all(outputs[name].token_ids == expected_tokens(prompt, 4) for name in names)


def test_chunks_are_cached_as_they_are_computed() -> None:
    engine = hash_engine(max_num_batched_tokens=8)
    prompt = list(range(30))
    first = engine.add_request(prompt, SamplingParams(max_tokens=2))
    engine.step()
    second = engine.add_request([*prompt[:8], 90], SamplingParams(max_tokens=2))
    outputs = drain(engine)
    assert outputs[second].metrics.num_cached_tokens >= 8
    assert outputs[first].token_ids == expected_tokens(prompt, 2)
    assert outputs[second].token_ids == expected_tokens([*prompt[:8], 90], 2)


def test_a_preempted_request_finds_its_own_blocks() -> None:
    engine = hash_engine(num_blocks=12, watermark=0.0)
    params = SamplingParams(max_tokens=26)
    prompts = [[1] * 8, [2] * 8]
    outputs = engine.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == expected_tokens(prompt, 26)
    assert outputs[1].metrics.num_preemptions > 0
    assert stats(engine).recovered_tokens > 0
    assert outputs[1].metrics.num_cached_tokens == 0, "that was no hit of the prompt"


def test_answers_are_cached_for_the_next_turn_and_for_forks() -> None:
    engine = hash_engine()
    parent = engine.add_request([1, 2, 3], SamplingParams(max_tokens=30))
    for _ in range(12):
        engine.step()
    child = engine.fork(parent, SamplingParams(max_tokens=20))
    outputs = drain(engine)
    assert outputs[child].token_ids == expected_tokens([1, 2, 3], 20)
    turn = [1, 2, 3, *outputs[parent].token_ids, 9]
    (answer,) = engine.generate([turn], SamplingParams(max_tokens=3))
    assert answer.token_ids == expected_tokens(turn, 3)
    assert answer.metrics.num_cached_tokens == 32


def test_an_aborted_request_leaves_what_it_computed() -> None:
    engine = hash_engine()
    name = engine.add_request(list(range(12)), SamplingParams(max_tokens=30))
    engine.step()
    engine.abort(name)
    drain(engine)
    (output,) = engine.generate([list(range(13))], SamplingParams(max_tokens=2))
    assert output.metrics.num_cached_tokens == 12
    assert output.token_ids == expected_tokens(list(range(13)), 2)


def test_nothing_of_a_failed_step_is_cached() -> None:
    model = HashModel()
    engine = hash_engine(model, max_num_batched_tokens=8)
    prompt = list(range(20))
    engine.add_request(prompt, SamplingParams(max_tokens=2))
    engine.step()
    model.failures = 1
    (failed,) = engine.step()
    assert failed.finish_reason == "error"
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=5))
    assert output.token_ids == expected_tokens(prompt, 5)
    assert output.metrics.num_cached_tokens == 0


def test_copies_that_a_failed_step_did_not_make_are_not_relied_on() -> None:
    """Admitted with a copy to come, but not in the step that fails: start again."""
    model = HashModel()
    engine = hash_engine(model, max_num_batched_tokens=8, max_num_seqs=4)
    engine.generate([list(range(8))], SamplingParams(max_tokens=1))
    long = engine.add_request(list(range(40, 60)), SamplingParams(max_tokens=2))
    short = engine.add_request([0, 1, 2, 3, 4, 5, 90], SamplingParams(max_tokens=4))
    step = engine.scheduler.schedule(0.0)
    bring_in = engine.scheduler.get(short)
    assert bring_in is not None
    if bring_in.status is RequestStatus.WAITING:  # the budget was spent: bring it in by hand
        engine.scheduler._waiting.remove(bring_in)
        engine.scheduler._start(step, bring_in, 0.0)
        engine.scheduler._join(bring_in)
    assert step.copies and bring_in not in step.requests
    engine.scheduler.fail(step, "injected")
    engine.check_invariants()
    outputs = drain(engine)
    assert outputs[short].token_ids == expected_tokens([0, 1, 2, 3, 4, 5, 90], 4)
    assert long not in outputs


def test_a_request_with_logits_that_are_no_numbers_leaves_nothing() -> None:
    model = HashModel()
    engine = hash_engine(model)
    prompt = list(range(12))
    model.nan_for = next_token(prompt)
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=2))
    assert output.finish_reason == "error"
    model.nan_for = None
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=2))
    assert output.metrics.num_cached_tokens == 0
    assert output.token_ids == expected_tokens(prompt, 2)


@pytest.mark.parametrize("damage", ["scramble", "zero"])
def test_a_damaged_shared_block_changes_the_tokens(smollm2: Transformer, damage: Any) -> None:
    engine = Engine(smollm2, EngineConfig(enable_prefix_caching=True, **PLENTY))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    (intact,) = engine.generate([SYSTEM + QUESTIONS[0]], params)
    prefix = engine.scheduler.residency.prefix
    assert prefix is not None
    for block in list(prefix.cached):
        engine.cache.corrupt_block(block, damage)
    (damaged,) = engine.generate([SYSTEM + QUESTIONS[0]], params)
    assert damaged.metrics.num_cached_tokens > 0
    assert damaged.token_ids != intact.token_ids


def test_quantised_blocks_are_shared_with_their_scales(tiny: Transformer) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 4
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    config = EngineConfig(block_size=8, num_blocks=20, kv_dtype="int8", enable_prefix_caching=True)
    engine = Engine(tiny, config)
    first, second = (engine.generate([prompt], params)[0] for _ in range(2))
    assert second.metrics.num_cached_tokens == 31 and second.token_ids == first.token_ids
