"""Prompts captured layer by layer, on a CPU: see captures.py."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import play_captures

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.disagg import stages
from ch15_helpers.disagg.colocated import SplitPools
from ch15_helpers.disagg.layer_graphs import LayerGraphs
from ch15_helpers.disagg.stages import DecodeEngine, PrefillEngine
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

    assert PrefillEngine(tiny, replace(CONFIG, capture_prompts=False)).runner.layer_graphs is None
    assert PrefillEngine(tiny_moe, CONFIG).runner.layer_graphs is None


class Stream:
    """A stream of a device that does at once what it is told."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def record_event(self) -> str:
        self.events.append("layers launched")
        return "event"

    def wait_event(self, event: str) -> None:
        self.events.append("blocks leave")

    def wait_stream(self, other: Stream) -> None:
        self.events.append("blocks there")


def test_blocks_that_leave_beside_a_decode_step_change_no_token(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    right = [o.token_ids for o in Engine(tiny, CONFIG).generate(PROMPTS, params)]
    pools = SplitPools(tiny, CONFIG, CONFIG, slice_work=1)
    events: list[str] = []
    monkeypatch.setattr(pools, "_beside", Stream(events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(events))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    launch = pools.decode.runner.launch

    def noted(step: Any) -> Any:
        events.append("decode launched")
        return launch(step)

    monkeypatch.setattr(pools.decode.runner, "launch", noted)
    assert [o.token_ids for o in pools.generate(PROMPTS, params)] == right
    pools.check_invariants()
    order = ["layers launched", "decode launched", "blocks leave", "blocks there"]
    assert events == order * (len(events) // 4) and len(events) > 8


def test_a_step_that_is_begun_may_fail(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DecodeEngine(tiny, CONFIG)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    (right,) = engine.generate([PROMPTS[1]], params)
    engine.add_request(PROMPTS[1], params)
    outputs = []
    while engine.scheduler.has_runnable:
        engine.begin()
        outputs += engine.finish()
    assert [o.token_ids for o in outputs] == [right.token_ids]

    def broken(step: Any) -> None:
        raise RuntimeError("injected")

    engine.add_request(PROMPTS[1], params)
    monkeypatch.setattr(engine.runner, "launch", broken)
    engine.begin()
    (output,) = engine.finish()
    assert output.error is not None and "injected" in output.error
    engine.check_invariants()
