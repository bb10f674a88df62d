"""Prompts captured layer by layer, on a CPU: see captures.py."""

from __future__ import annotations

from typing import Any

import pytest
from captures import play_captures

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.disagg import stages
from ch15_helpers.disagg.colocated import SplitPools
from ch15_helpers.disagg.layer_graphs import LayerGraphs
from ch15_helpers.disagg.stages import PrefillEngine
from ch15_helpers.model.transformer import Transformer

CONFIG = EngineConfig(
    block_size=8, num_blocks=60, max_num_seqs=4, max_num_batched_tokens=64, capture_decode=False
)
PROMPTS = [[(7 * i + n) % 300 for i in range(n)] for n in (1, 5, 33, 64, 90, 17)]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts replays of layers."""
    monkeypatch.setattr(
        stages, "can_capture", lambda model, backend: all(m.mlp.can_capture for m in model.layers)
    )
    return play_captures(monkeypatch)


@pytest.mark.parametrize("slice_work", [None, 1, 64])
def test_split_pools_with_captured_layers_give_the_engines_tokens(
    tiny: Transformer, counts: dict[str, int], slice_work: int | None
) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    right = [o.token_ids for o in Engine(tiny, CONFIG).generate(PROMPTS, params)]
    assert counts["replays"] == 0
    pools = SplitPools(tiny, CONFIG, CONFIG, slice_work=slice_work)
    outputs = pools.generate(PROMPTS, params)
    assert [o.error for o in outputs] == [None] * len(PROMPTS)
    assert [o.token_ids for o in outputs] == right
    pools.check_invariants()
    # Five of the six fit: a prompt of 90 tokens is longer than the ladder, and launched eagerly.
    assert counts["replays"] == 5 * tiny.config.num_hidden_layers


def test_every_layer_is_reported_once_and_in_order(
    tiny: Transformer, counts: dict[str, int]
) -> None:
    engine = PrefillEngine(tiny, CONFIG)
    graphs = engine.runner.layer_graphs
    assert isinstance(graphs, LayerGraphs)
    assert graphs.prompt_sizes == [16, 24, 32, 48, 64] and graphs.sizes == []
    seen: list[Any] = []
    engine.runner.on_layer = lambda step, layer: seen.append((step.num_tokens, layer))
    first = SamplingParams(max_tokens=1)
    engine.generate([PROMPTS[0]], first)
    engine.generate([PROMPTS[2], PROMPTS[5]], first)
    assert seen == [(1, 0), (1, 1), (50, 0), (50, 1)]
    assert counts["replays"] == 4
    engine.runner.on_layer = None
    engine.generate([PROMPTS[2]], first)
    assert counts["replays"] == 6 and len(seen) == 4


def test_layers_are_not_captured_when_that_is_not_wanted(
    tiny: Transformer, tiny_moe: Transformer, counts: dict[str, int]
) -> None:
    from dataclasses import replace

    assert PrefillEngine(tiny, replace(CONFIG, capture_prompts=False)).runner.layer_graphs is None
    assert PrefillEngine(tiny_moe, CONFIG).runner.layer_graphs is None
