"""The decode side's engine: what ``stages`` has, with speculation where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.disagg.stages import DecodeEngine, DecodeScheduler, LayerwiseRunner
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.request import Request, SamplingParams
from ch15_helpers.speculative.draft_model import LayerSkipProposer
from ch15_helpers.speculative.engine import (
    SpeculativeEngine,
    SpeculativeRunner,
    SpeculativeScheduler,
)
from ch15_helpers.speculative.proposers import PromptLookupProposer, Proposer


class LayerwiseDecodeEngine(DecodeEngine):
    """A DecodeEngine that reports layers, so that messages are read while a step runs."""

    runner_type = LayerwiseRunner


class SpeculativeDecodeScheduler(DecodeScheduler, SpeculativeScheduler):
    """Takes requests in, and plans room for drafts."""


class SpeculativeDecodeRunner(LayerwiseRunner, SpeculativeRunner):
    """Verifies drafts, and reports layers."""


class SpeculativeDecodeEngine(DecodeEngine, SpeculativeEngine):
    """A DecodeEngine that drafts and verifies."""

    scheduler_type = SpeculativeDecodeScheduler
    runner_type = SpeculativeDecodeRunner


def decode_engine(model: Transformer, spec: DisaggSpec, **options: Any) -> DecodeEngine:
    """The engine of a decode rank.

    On a GPU it is the plain one, whose steps are captured and launched ahead; messages are then
    read between two steps, which are short.
    """
    config = spec.engine_config("decode")
    if spec.speculate is not None:
        lengths, proposer = spec.draft_length, _proposer(model, spec, config)
        return SpeculativeDecodeEngine(model, config, proposer=proposer, lengths=lengths, **options)
    kind = LayerwiseDecodeEngine if model.device.type == "cpu" else DecodeEngine
    return kind(model, config, **options)


def _proposer(
    model: Transformer, spec: DisaggSpec, config: EngineConfig
) -> Proposer | Callable[[Engine], Proposer]:
    if spec.speculate == "ngram":
        return PromptLookupProposer()
    layers = spec.draft_layers or max(1, model.config.num_hidden_layers // 2)

    def skipping(engine: Engine) -> Proposer:
        blocks, backend = engine.scheduler.blocks, config.attention_backend
        return LayerSkipProposer(model, layers, engine.cache, blocks, attention_backend=backend)

    return skipping


def arriving_request(
    name: str, prompt: list[int], params: SamplingParams, model: Transformer, arrival_s: float
) -> Request:
    """A request as the monolithic engine would have made it, seed included."""
    assert params.seed is not None, "the coordinator gives every request a seed"
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        params=params,
        arrival_s=arrival_s,
        eos_token_ids=model.config.eos_token_ids,
        seed=params.seed,
    )
