"""Same tokens whatever way a request is served, on real and on random weights, in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ch15_helpers import Engine, EngineConfig, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer

TINY_LENGTHS = (1, 5, 16, 17, 40)
TINY_TOKENS = 24
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils at a temperature of",
)


@dataclass(frozen=True)
class Way:
    """One way of serving, and what must have happened for it to prove anything."""

    config: dict[str, Any]
    alone: bool = False
    preempts: bool = False
    swaps: bool = False
    max_step_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# A pool of 13 blocks of 8 tokens is too small for the five prompts (14 blocks at the end).
WAYS = {
    "alone": Way({}, alone=True),
    "batched": Way({}),
    "two at a time": Way({"max_num_seqs": 2}),
    "chunks of 1": Way({"max_num_batched_tokens": 5}, max_step_tokens=5),
    "chunks of 7": Way({"max_num_batched_tokens": 7}, max_step_tokens=7),
    "chunks of 32": Way({"max_num_batched_tokens": 32}, max_step_tokens=32),
    "not chunked": Way({"enable_chunked_prefill": False, "max_num_batched_tokens": 16}),
    "recomputed": Way({"num_blocks": 13, "watermark": 0.0}, preempts=True),
    "recomputed in chunks": Way(
        {"num_blocks": 13, "watermark": 0.0, "max_num_batched_tokens": 6}, preempts=True
    ),
    "swapped": Way(
        {"num_blocks": 13, "watermark": 0.0, "preemption": "swap", "num_host_blocks": 20},
        preempts=True,
        swaps=True,
    ),
    "swapped until the host is full": Way(
        {"num_blocks": 10, "watermark": 0.0, "preemption": "swap", "num_host_blocks": 4},
        preempts=True,
        swaps=True,
    ),
    "blocks of 1": Way({"block_size": 1, "num_blocks": 400}),
    "blocks of 3": Way({"block_size": 3}),
    "layer-major": Way({"kv_layout": "layer_major"}),
    "reference attention": Way({"attention_backend": "reference"}),
}


def serve(
    model: Transformer, prompts: list[Any], params: list[SamplingParams], way: Way, **config: Any
) -> list[RequestOutput]:
    """Run, and check that the way of serving really took place and left nothing behind."""
    steps: list[Any] = []
    settings = {"block_size": 8, "num_blocks": 100, **config, **way.config}
    engine = Engine(model, EngineConfig(**settings), on_step=steps.append)
    if way.alone:
        pairs = zip(prompts, params, strict=True)
        outputs = [engine.generate([prompt], one)[0] for prompt, one in pairs]
    else:
        outputs = engine.generate(prompts, params)
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    assert (engine.scheduler.num_preemptions > 0) == way.preempts
    assert any(record.step.swap_in for record in steps) == way.swaps
    if way.max_step_tokens is not None:
        assert max(record.num_tokens for record in steps) == way.max_step_tokens
    return outputs


def tiny_work(model: Transformer, seeded: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = torch.Generator().manual_seed(11)
    vocab = model.config.vocab_size
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in TINY_LENGTHS]
    sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 50, "top_p": 0.95} if seeded else {}
    params = [
        SamplingParams(max_tokens=TINY_TOKENS, ignore_eos=True, seed=i, **sampled)
        for i in range(len(prompts))
    ]
    return prompts, params


def recompute_everything(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without any KV cache: the oracle that shares nothing with the engine."""
    known = list(prompt)
    for _ in range(count):
        logits = model.forward_dense(torch.tensor([known], device=model.device))
        known.append(int(logits[0, -1].argmax()))
    return known[len(prompt) :]


@pytest.fixture(scope="module", params=["tiny", "tiny_moe"])
def random_model(request: pytest.FixtureRequest) -> Transformer:
    model: Transformer = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="module")
def greedy_tokens(random_model: Transformer) -> list[list[int]]:
    prompts, _ = tiny_work(random_model, seeded=False)
    return [recompute_everything(random_model, prompt, TINY_TOKENS) for prompt in prompts]


@pytest.fixture(scope="module")
def seeded_tokens(random_model: Transformer) -> list[list[int]]:
    prompts, params = tiny_work(random_model, seeded=True)
    return [o.token_ids for o in serve(random_model, prompts, params, WAYS["alone"])]


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_equal_recomputing_everything(
    random_model: Transformer, greedy_tokens: list[list[int]], way: str
) -> None:
    prompts, params = tiny_work(random_model, seeded=False)
    outputs = serve(random_model, prompts, params, WAYS[way])
    assert [output.token_ids for output in outputs] == greedy_tokens


@pytest.mark.parametrize("way", WAYS)
def test_seeded_tokens_equal_being_alone(
    random_model: Transformer, seeded_tokens: list[list[int]], way: str
) -> None:
    prompts, params = tiny_work(random_model, seeded=True)
    outputs = serve(random_model, prompts, params, WAYS[way])
    assert [output.token_ids for output in outputs] == seeded_tokens


SMOLLM2_WAYS = {
    "batched": Way({}),
    "chunks of 5": Way({"max_num_batched_tokens": 5}, max_step_tokens=5),
    "not chunked": Way({"enable_chunked_prefill": False, "max_num_batched_tokens": 8}),
    "recomputed": Way({"num_blocks": 8, "watermark": 0.0}, preempts=True),
    "swapped": Way(
        {"num_blocks": 8, "watermark": 0.0, "preemption": "swap", "num_host_blocks": 20},
        preempts=True,
        swaps=True,
    ),
    "layer-major": Way({"kv_layout": "layer_major"}),
}


def smollm2_params(seeded: bool) -> list[SamplingParams]:
    sampled: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9} if seeded else {}
    return [
        SamplingParams(max_tokens=12, ignore_eos=True, seed=i, **sampled) for i in range(len(TEXTS))
    ]


@pytest.fixture(scope="module")
def smollm2_tokens(smollm2: Transformer) -> dict[bool, list[list[int]]]:
    return {
        seeded: [
            o.token_ids
            for o in serve(
                smollm2, list(TEXTS), smollm2_params(seeded), Way({}, alone=True), block_size=4
            )
        ]
        for seeded in (False, True)
    }


@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize("way", SMOLLM2_WAYS)
def test_smollm2_tokens_equal_being_alone(
    smollm2: Transformer, smollm2_tokens: dict[bool, list[list[int]]], way: str, seeded: bool
) -> None:
    params = smollm2_params(seeded)
    outputs = serve(smollm2, list(TEXTS), params, SMOLLM2_WAYS[way], block_size=4)
    assert [output.token_ids for output in outputs] == smollm2_tokens[seeded]


def test_smollm2_says_paris_and_equals_recomputing_everything(
    smollm2: Transformer, smollm2_tokens: dict[bool, list[list[int]]]
) -> None:
    (output,) = Engine(smollm2, EngineConfig(num_blocks=8)).generate(
        [TEXTS[0]], SamplingParams(max_tokens=4)
    )
    assert output.text.startswith(" Paris.")
    assert output.finish_reason == "length" and output.error is None
    expected = recompute_everything(smollm2, output.prompt_token_ids, 12)
    assert smollm2_tokens[False][0] == expected


def test_a_fork_continues_as_its_parent_and_both_as_if_alone(smollm2: Transformer) -> None:
    params = SamplingParams(max_tokens=14, ignore_eos=True, temperature=0.8, seed=3)
    engine = Engine(smollm2, EngineConfig(block_size=4, num_blocks=40))
    (alone,) = engine.generate([TEXTS[1]], params)
    parent = engine.add_request(TEXTS[1], params)
    for _ in range(5):
        engine.step()
    twin = engine.fork(parent)
    greedy = engine.fork(parent, SamplingParams(max_tokens=14, ignore_eos=True))
    used = engine.scheduler.blocks.allocator.num_used
    assert used == len(engine.scheduler.blocks.table(parent))  # nothing was copied yet
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        done.update({output.request_id: output for output in engine.step()})
    assert done[parent].token_ids == alone.token_ids
    assert done[twin].token_ids == alone.token_ids
    tail = recompute_everything(smollm2, alone.prompt_token_ids + alone.token_ids[:5], 14 - 5)
    assert done[greedy].token_ids == alone.token_ids[:5] + tail
    engine.check_invariants()


DAMAGE = {
    "scrambled": lambda cache, table: cache.corrupt_block(table[1], "scramble"),
    "withheld": lambda cache, table: cache.corrupt_block(table[1], "zero"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kv_block_changes_the_tokens(smollm2: Transformer, damage: str) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    engine = Engine(smollm2, EngineConfig(block_size=4, num_blocks=40))
    (intact,) = engine.generate([TEXTS[1]], params)
    name = engine.add_request(TEXTS[1], params)
    engine.step()
    DAMAGE[damage](engine.cache, engine.scheduler.blocks.table(name))
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert outputs[0].token_ids[0] == intact.token_ids[0]  # sampled before the damage
    assert outputs[0].token_ids != intact.token_ids


def test_blocks_exchanged_between_requests_change_the_tokens_of_both(
    smollm2: Transformer, smollm2_tokens: dict[bool, list[list[int]]]
) -> None:
    def run(exchange: bool) -> list[list[int]]:
        engine = Engine(smollm2, EngineConfig(block_size=4, num_blocks=40))
        pairs = zip(TEXTS[1:], smollm2_params(False)[1:], strict=True)
        names = [engine.add_request(text, params) for text, params in pairs]
        engine.step()
        first, second = (engine.scheduler.blocks.table(name) for name in names)
        if exchange:
            engine.cache.exchange_blocks(first[0], second[0])
            engine.cache.exchange_blocks(first[1], second[1])
        else:
            engine.cache.exchange_blocks(first[0], first[1])
        done: dict[str, list[int]] = {}
        while engine.has_unfinished:
            done.update({output.request_id: output.token_ids for output in engine.step()})
        return [done[name] for name in names]

    for damaged, intact in zip(run(True), smollm2_tokens[False][1:], strict=True):
        assert damaged != intact
    # Two full blocks of one request may trade places: keys carry their positions already, and
    # attention is a sum over them in any order. A check must not rely on that kind of damage.
    assert run(False) == smollm2_tokens[False][1:]


def test_a_block_damaged_on_the_host_changes_the_tokens(
    smollm2: Transformer, smollm2_tokens: dict[bool, list[list[int]]]
) -> None:
    config = EngineConfig(
        block_size=4, num_blocks=8, watermark=0.0, preemption="swap", num_host_blocks=20
    )
    engine = Engine(smollm2, config)
    assert engine.host_cache is not None
    names = [engine.add_request(t, p) for t, p in zip(TEXTS, smollm2_params(False), strict=True)]
    outputs: dict[str, RequestOutput] = {}
    damaged = None
    while engine.has_unfinished:
        if damaged is None:
            for request in engine.scheduler.waiting:
                if request.host_blocks:
                    damaged = request.request_id
                    for block in request.host_blocks:
                        engine.host_cache.corrupt_block(block)
                    break
        outputs.update({output.request_id: output for output in engine.step()})
    assert damaged is not None
    for name, expected in zip(names, smollm2_tokens[False], strict=True):
        assert (outputs[name].token_ids != expected) == (name == damaged)


def test_kv_in_half_precision_is_close_and_half_the_size(tiny: Transformer) -> None:
    engine = Engine(tiny, EngineConfig(num_blocks=8, kv_dtype=torch.bfloat16))
    full = Engine(tiny, EngineConfig(num_blocks=8))
    assert engine.cache.dtype == torch.bfloat16
    assert 2 * engine.cache.nbytes == full.cache.nbytes
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = [list(range(20))]
    assert engine.generate(prompt, params)[0].token_ids[0] < tiny.config.vocab_size


def test_seeds_of_requests_without_one_come_from_the_engine(tiny: Transformer) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    prompts = [[1, 2, 3]] * 3

    def run(seed: int) -> list[list[int]]:
        engine = Engine(tiny, EngineConfig(num_blocks=20, seed=seed))
        return [output.token_ids for output in engine.generate(prompts, params)]

    first = run(0)
    assert run(0) == first and run(1) != first
    assert len({tuple(tokens) for tokens in first}) == 3
