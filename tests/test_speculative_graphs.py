"""Speculation in captured steps, on a CPU: see captures.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import play_captures
from torch import Tensor

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving import graphs as graphs_module
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.graph_buffers import StepShape
from ch15_helpers.serving.graphs import StepGraphs, verification_ladder
from ch15_helpers.speculative import drafting
from ch15_helpers.speculative.draft_model import (
    LayerSkipProposer,
    SmallModelProposer,
    first_layers,
)
from ch15_helpers.speculative.engine import SpeculativeEngine
from ch15_helpers.speculative.proposers import PromptLookupProposer
from ch15_helpers.speculative.verify import Draft

TEXT = [(13 * i) % 50 for i in range(40)] * 2
PROMPTS = [TEXT, TEXT[5:60], [7, 8, 9] * 9, [(i * i) % 500 for i in range(33)]]
CONFIG = EngineConfig(block_size=8, num_blocks=90, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts replays."""
    monkeypatch.setattr(drafting, "can_capture", lambda model, backend: True)
    return play_captures(monkeypatch)


def captured(engine: SpeculativeEngine) -> SpeculativeEngine:
    """The same engine with graphs, as on a GPU."""
    runner = engine.runner
    graphs = StepGraphs(engine.model, engine.cache, 4, 512, runner.last_ids)
    graphs.capture(graphs.prompt_shapes(CONFIG.max_num_batched_tokens) + graphs.decode_shapes())
    runner.graphs = graphs
    engine._capture()
    if isinstance(engine.proposer, drafting.ModelProposer):
        engine.proposer.capture(CONFIG)
    return engine


def proposer_of(name: str, model: Transformer) -> Any:
    return {
        "lookup": PromptLookupProposer(),
        "layers": lambda e: LayerSkipProposer(model, 1, e.cache, e.scheduler.blocks),
        "small": SmallModelProposer(first_layers(model, 1), model, 64, 8),
    }[name]


@pytest.mark.parametrize("name", ["lookup", "layers", "small"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_captured_speculation_gives_the_eager_tokens(
    tiny: Transformer, counts: dict[str, int], name: str, temperature: float
) -> None:
    params = [
        SamplingParams(max_tokens=n, temperature=temperature * (n != 7), top_k=20, seed=n)
        for n in (24, 7, 30, 16)
    ]
    uncaptured = replace(CONFIG, capture_decode=False)
    eager = SpeculativeEngine(tiny, uncaptured, proposer=proposer_of(name, tiny), lengths=4)
    right = [o.token_ids for o in eager.generate(PROMPTS, params)]
    assert counts["replays"] == 0
    engine = SpeculativeEngine(tiny, CONFIG, proposer=proposer_of(name, tiny), lengths=4)
    outputs = captured(engine).generate(PROMPTS, params)
    assert [o.error for o in outputs] == [None] * 4
    found = [o.token_ids for o in outputs]
    if name == "lookup" or temperature == 0:  # others depend on where drafts began
        assert found == right
    else:
        assert [len(tokens) for tokens in found] == [len(tokens) for tokens in right]
    assert engine.stats.num_verifications > 2
    assert temperature or engine.stats.num_accepted > 0
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0


def test_every_step_is_a_replay_and_a_draft_waits_once(
    tiny: Transformer, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = captured(
        SpeculativeEngine(tiny, CONFIG, proposer=proposer_of("layers", tiny), lengths=4)
    )
    waits = 0
    tolist = Tensor.tolist

    def counted(self: Tensor) -> Any:
        nonlocal waits
        # Lengths on the host are the stand-in's own; ids are what a step would wait for.
        waits += self.dtype == torch.int64 and self.dim() == 1 and not self.is_floating_point()
        return tolist(self)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step ran uncaptured")

    monkeypatch.setattr(engine.runner, "_execute", refuse)
    monkeypatch.setattr(engine.proposer._uploader, "upload", refuse)
    monkeypatch.setattr(Tensor, "tolist", counted)
    steps = engine.num_steps
    outputs = engine.generate(PROMPTS[:2], SamplingParams(max_tokens=14, ignore_eos=True))
    assert all(len(output.token_ids) == 14 for output in outputs)
    speculated = engine.num_steps - steps
    assert engine.stats.num_verifications > 2
    assert waits <= 2 * speculated, "one wait for the drafts, one for the verification"


def test_drafts_of_any_mixture_of_lengths_share_a_graph(
    tiny: Transformer, counts: dict[str, int]
) -> None:
    class Uneven:
        """Drafts what the request said before, a different number of tokens for each."""

        def propose(self, requests: Any, limits: Any) -> list[Draft]:
            return [
                Draft(request.tokens(0, min(limit, number)))
                for number, (request, limit) in enumerate(zip(requests, limits, strict=True))
            ]

        def forget(self, request_id: str) -> None:
            pass

    params = SamplingParams(max_tokens=12, ignore_eos=True)
    right = [o.token_ids for o in Engine(tiny, CONFIG).generate(PROMPTS, params)]
    engine = captured(SpeculativeEngine(tiny, CONFIG, proposer=Uneven(), lengths=4))
    assert [o.token_ids for o in engine.generate(PROMPTS, params)] == right
    assert counts["replays"] == engine.num_steps


def test_prompts_beside_decodes_are_one_launch_without_drafts(
    tiny: Transformer, counts: dict[str, int]
) -> None:
    engine = captured(
        SpeculativeEngine(tiny, CONFIG, proposer=proposer_of("lookup", tiny), lengths=4)
    )
    mixed = []
    engine.on_step = lambda record: mixed.append(
        (bool(record.step.chunks and record.step.decodes), sum(record.step.drafts))  # type: ignore[attr-defined]
    )
    engine.add_request(PROMPTS[2], SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.add_request(PROMPTS[3], SamplingParams(max_tokens=4, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert [drafts for both, drafts in mixed if both] == [0]
    assert sum(drafts for _, drafts in mixed) > 0
    assert counts["replays"] == len(mixed)


def batch_of(lens: list[int], logits: int, width: int = 2) -> HostBatch:
    """Sequences of so many tokens at the start of their contexts."""
    import numpy as np

    total = sum(lens)
    return HostBatch(
        token_ids=np.zeros(total, dtype=np.int64),
        positions=np.zeros(total, dtype=np.int64),
        slot_mapping=np.zeros(total, dtype=np.int64),
        logits_indices=np.arange(logits, dtype=np.int64),
        query_starts=np.cumsum([0, *lens]).astype(np.int32),
        context_lens=np.array(lens, dtype=np.int32),
        block_tables=np.zeros((len(lens), width), dtype=np.int32),
        query_lens=tuple(lens),
    )


def test_which_verifications_are_captured(
    tiny: Transformer, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = captured(
        SpeculativeEngine(tiny, CONFIG, proposer=PromptLookupProposer(), lengths=4)
    ).runner.graphs
    assert graphs is not None
    assert graphs.verification_sizes == verification_ladder(tiny.config, 20)
    assert graphs.verification_sizes == [4, 8, 16, 20]
    kept = [one for shape, one in graphs._captured.items() if shape.verifies]
    assert len({one.logits.data_ptr() for one in kept}) == 1, "they share one place for logits"

    def fit(lens: list[int]) -> StepShape | None:
        return graphs._fit(batch_of(lens, sum(lens)))[0]

    assert fit([5]) == StepShape(8, 4, 8, 5, verifies=True)
    assert fit([5, 1, 1, 3]) == StepShape(16, 4, 16, 5, verifies=True)
    assert fit([5] * 4) == StepShape(20, 4, 20, 5, verifies=True)
    assert fit([5] * 4 + [2]) is None, "more than the ladder"
    assert fit([1, 1]) == StepShape.decode(2)
    # Longer drafts than the attention takes at once are cut into pieces.
    monkeypatch.setattr(graphs, "_query_len", 4)
    shapes = graphs.verification_shapes(9, 64)
    assert graphs.verification_sizes == [] and shapes[0].tokens == 40
    graphs.capture(shapes)
    shape, pieces = graphs._fit(batch_of([10, 3], 13))
    assert shape is not None and shape.query_len == 4 and pieces.query_lens == (4, 4, 2, 3)


def test_longer_drafts_are_captured_when_they_are_asked_for(
    tiny: Transformer, counts: dict[str, int]
) -> None:
    engine = captured(SpeculativeEngine(tiny, CONFIG, proposer=PromptLookupProposer(), lengths=2))
    graphs = engine.runner.graphs
    assert graphs is not None and graphs.verification_sizes[-1] == 4 * 3
    engine.set_lengths(1)
    assert graphs.verification_sizes[-1] == 4 * 3
    engine.set_lengths(6)
    assert graphs.verification_sizes[-1] == 4 * 7
    assert {s.query_len for s in graphs._captured if s.verifies and s.tokens > 6} == {7}
    assert graphs_module.ladder(4) == graphs.sizes
