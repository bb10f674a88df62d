"""The engine on a GPU: captured and eager steps, and the CPU, give the same tokens."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.serving.graphs import ladder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def add(a, b):\n    return",
    "One, two, three, four,",
    "The opposite of hot is",
]


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2", device="cuda", dtype=torch.float32)


def generate(model, prompts, params, **config):
    engine = Engine(model, EngineConfig(max_num_seqs=8, num_blocks=512, **config))
    outputs = engine.generate(prompts, params)
    assert all(output.error is None for output in outputs)
    return engine, [output.token_ids for output in outputs]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_and_eager_steps_give_the_same_tokens(model, temperature):
    params = SamplingParams(max_tokens=32, temperature=temperature, seed=7, ignore_eos=True)
    captured, first = generate(model, PROMPTS, params)
    eager, second = generate(model, PROMPTS, params, capture_decode=False)
    assert captured.runner.graphs is not None
    assert captured.runner.graphs.sizes == ladder(8)
    assert eager.runner.graphs is None
    assert first == second


def test_gpu_and_cpu_give_the_same_greedy_tokens(model):
    params = SamplingParams(max_tokens=24)
    _, on_gpu = generate(model, PROMPTS, params)
    _, on_cpu = generate(load_model("smollm2", device="cpu"), PROMPTS, params)
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
