"""Speculation and prompts in slices on a GPU: captured steps give the tokens of eager ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.disagg.colocated import SplitPools
from ch15_helpers.speculative.draft_model import (
    LayerSkipProposer,
    SmallModelProposer,
    first_layers,
)
from ch15_helpers.speculative.engine import SpeculativeEngine
from ch15_helpers.speculative.proposers import PromptLookupProposer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXT = [(13 * i) % 50 + 1000 for i in range(40)] * 2
PROMPTS = [TEXT, TEXT[5:60], [7, 8, 9] * 9, [(i * i) % 500 for i in range(133)]]
CONFIG = EngineConfig(num_blocks=256, max_num_seqs=4, max_num_batched_tokens=128)
EAGER = replace(CONFIG, capture_decode=False, capture_prompts=False)


@pytest.fixture(scope="module")
def model():
    return load_model("random:SMOLLM2_135M", device="cuda", dtype=torch.float32)


def tokens_of(engine, params):
    outputs = engine.generate(PROMPTS, params)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    return [output.token_ids for output in outputs]


def proposer_of(name, model):
    layers = model.config.num_hidden_layers
    return {
        "lookup": lambda e: PromptLookupProposer(),
        "layers": lambda e: LayerSkipProposer(model, layers - 2, e.cache, e.scheduler.blocks),
        "small": lambda e: SmallModelProposer(first_layers(model, layers - 2), model, 128),
    }[name]


@pytest.mark.parametrize("name", ["lookup", "layers", "small"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_speculation_gives_the_tokens_of_eager_speculation(model, name, temperature):
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=3, ignore_eos=True)
    found, engines = {}, {}
    for how, config in (("captured", CONFIG), ("eager", EAGER)):
        engine = engines[how] = SpeculativeEngine(
            model, config, proposer=proposer_of(name, model), lengths=5
        )
        found[how] = tokens_of(engine, params)
        engine.check_invariants()
    graphs = engines["captured"].runner.graphs
    assert graphs.verification_sizes[-1] == 4 * 6 and graphs.prompt_sizes[-1] == 128
    assert engines["eager"].runner.graphs is None
    assert engines["captured"].stats.num_verifications > 0
    if temperature == 0 or name == "lookup":  # others depend on where drafts began
        assert found["captured"] == found["eager"] == tokens_of(Engine(model, CONFIG), params)


def test_a_verification_is_a_replay(model, monkeypatch):
    engine = SpeculativeEngine(model, CONFIG, proposer=proposer_of("layers", model), lengths=5)
    monkeypatch.setattr(engine.runner, "_execute", None)
    monkeypatch.setattr(engine.proposer, "_uploader", None)
    tokens_of(engine, SamplingParams(max_tokens=20, ignore_eos=True))
    assert engine.stats.num_verifications > 0


@pytest.mark.parametrize("slice_work", [None, 100, 600])
def test_split_pools_with_captured_layers_give_the_engines_tokens(model, slice_work):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    right = tokens_of(Engine(model, replace(CONFIG, async_scheduling=False)), params)
    pools = SplitPools(model, CONFIG, CONFIG, slice_work=slice_work)
    graphs = pools.prefill.runner.layer_graphs
    assert graphs is not None and graphs.prompt_sizes[-1] == 128
    assert tokens_of(pools, params) == right
    pools.check_invariants()
