"""Speculation changes the number of steps and nothing else: tokens, tables, pools and content."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import VOCAB, HashModel, expected_tokens, next_token
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ch15_helpers import Engine, EngineConfig, InvalidRequestError, SamplingParams
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.request import Request
from ch15_helpers.speculative.draft_model import (
    LayerSkipProposer,
    SmallModelProposer,
    first_layers,
)
from ch15_helpers.speculative.engine import SpeculativeEngine, SpeculativeStep
from ch15_helpers.speculative.lengths import AdaptiveLength, SpeculationCost, StepwiseLength
from ch15_helpers.speculative.proposers import PromptLookupProposer
from ch15_helpers.speculative.verify import Draft


class RowsModel(HashModel):
    """HashModel that answers at every row, and checks what each row reads."""

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        pages: Tensor,
        batch: BatchMetadata,
        *,
        attention_backend: str = "auto",
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        size = pages.shape[3]
        slots = batch.slot_mapping
        assert len(set(slots.tolist())) == len(token_ids), "two writers of one slot"
        if self.failures:
            self.failures -= 1
            pages[slots // size, :, :, slots % size] = -1.0
            raise RuntimeError("injected failure")
        pages[slots // size, 0, 0, slots % size, 0, 0] = token_ids.float()
        pages[slots // size, 0, 1, slots % size, 0, 0] = positions.float()
        answers: dict[int, int] = {}
        starts = batch.query_starts.tolist()
        for number, length in enumerate(batch.context_lens.tolist()):
            where = torch.arange(length)
            table = batch.block_tables[number].long()[where // size]
            known = pages[table, 0, 0, where % size, 0, 0].long().tolist()
            found = pages[table, 0, 1, where % size, 0, 0].long()
            assert torch.equal(found, where), f"sequence {number}: positions {found.tolist()}"
            for back in range(starts[number + 1] - starts[number]):
                answers[starts[number + 1] - 1 - back] = next_token(known[: length - back])
        logits = torch.zeros(len(batch.logits_indices), VOCAB)
        for row, index in enumerate(batch.logits_indices.tolist()):
            logits[row, answers[index]] = 1.0
            if answers[index] == self.nan_for:
                logits[row, 5] = torch.nan
        return logits


class Oracle:
    """Knows the right continuation, and errs at random; drafts of any length up to the limit."""

    def __init__(self, seed: int, accuracy: float) -> None:
        self.dice, self.accuracy = random.Random(seed), accuracy
        self.forgotten: list[str] = []

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            known = request.tokens(0, request.num_tokens)
            draft: list[int] = []
            for _ in range(self.dice.randint(0, limit)):
                right = next_token([*known, *draft])
                wrong = (right + self.dice.randrange(1, VOCAB)) % VOCAB
                draft.append(right if self.dice.random() < self.accuracy else wrong)
            drafts.append(Draft(draft))
        return drafts

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)


def drained(engine: Engine) -> None:
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    assert engine.scheduler.blocks.num_seqs == 0


# ---- random use --------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    accuracy=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    block_size=st.sampled_from([1, 2, 4, 5]),
    num_blocks=st.sampled_from([6, 12, 24, 60]),
    budget=st.sampled_from([3, 8, 30]),
    length=st.integers(1, 7),
    preemption=st.sampled_from(["recompute", "swap"]),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "least_slack"]),
)
@settings(max_examples=120, deadline=None)
def test_any_pattern_of_accepts_and_rejects_gives_the_tokens_of_plain_decoding(
    seed: int,
    accuracy: float,
    block_size: int,
    num_blocks: int,
    budget: int,
    length: int,
    preemption: Any,
    caching: bool,
    policy: str,
) -> None:
    dice = random.Random(seed)
    oracle = Oracle(seed, accuracy)
    ticks = itertools.count()
    engine = SpeculativeEngine(
        RowsModel(60),  # type: ignore[arg-type]
        EngineConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            preemption=preemption,
            num_host_blocks=8 if preemption == "swap" else 0,
            enable_prefix_caching=caching,
            policy=policy,
        ),
        proposer=oracle,
        lengths=length,
        clock=lambda: float(next(ticks)),
    )
    shared = [dice.randrange(VOCAB) for _ in range(8)]
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    left = 6
    for _ in range(2000):
        if left and dice.random() < 0.3:
            left -= 1
            prompt = [*(shared if dice.random() < 0.5 else []), dice.randrange(VOCAB)]
            prompt += [dice.randrange(VOCAB) for _ in range(dice.randint(0, 6))]
            stop = tuple(dice.randrange(VOCAB) for _ in range(dice.randint(0, 2)))
            params = SamplingParams(max_tokens=dice.randint(1, 30), stop_token_ids=stop)
            asked[engine.add_request(prompt, params)] = (prompt, params)
        elif asked and dice.random() < 0.03:
            engine.abort(dice.choice(sorted(asked)))
        elif engine.scheduler.running and dice.random() < 0.1:
            decoding = [r for r in engine.scheduler.running if r.output_token_ids]
            if decoding:
                parent = dice.choice(sorted(decoding, key=lambda r: r.request_id))
                params = SamplingParams(max_tokens=dice.randint(20, 30))
                try:
                    child = engine.fork(parent.request_id, params)
                except InvalidRequestError:
                    continue
                asked[child] = (parent.prompt_token_ids, params)
        for output in engine.step():
            prompt, params = asked.pop(output.request_id)
            right = expected_tokens(prompt, params.max_tokens, params.stop_token_ids, 60)
            if output.finish_reason in ("stop", "length"):
                assert output.token_ids == right
            else:
                assert output.token_ids == right[: len(output.token_ids)]
                assert output.finish_reason == "abort" or "blocks" in str(output.error)
            assert len(output.metrics.itl_s) == max(0, len(output.token_ids) - 1)
            assert output.request_id in oracle.forgotten
        engine.check_invariants()
        if not left and not asked:
            break
    assert not asked
    drained(engine)
    if accuracy == 1.0:
        assert engine.stats.num_accepted == engine.stats.num_drafted
    if accuracy == 0.0:
        assert engine.stats.num_accepted == 0


def test_tables_and_content_equal_plain_decoding_after_every_step() -> None:
    """At equal token counts both engines hold as many blocks, with the same content."""
    prompt = [3, 1, 4, 1, 5]
    config = EngineConfig(block_size=4, num_blocks=30)
    plain = Engine(RowsModel(), config)  # type: ignore[arg-type]
    fast = SpeculativeEngine(RowsModel(), config, proposer=Oracle(1, 0.7), lengths=5)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=40)
    states: dict[int, tuple[int, list[float]]] = {}

    def state(engine: Engine) -> tuple[int, int, list[float]]:
        (request,) = engine.scheduler.running
        table = engine.scheduler.blocks.table(request.request_id)
        count = request.num_computed_tokens
        assert len(table) == engine.scheduler.blocks.blocks_for(count) or len(table) * 4 > count
        tokens = engine.cache.pages[table, 0, 0, :, 0, 0].flatten()[:count].tolist()
        return count, len(table), tokens

    plain.add_request(prompt, params)
    while True:
        plain.step()
        if not plain.has_unfinished:
            break
        count, blocks, tokens = state(plain)
        states[count] = blocks, tokens
    fast.add_request(prompt, params)
    steps = 0
    while True:
        fast.step()
        steps += 1
        if not fast.has_unfinished:
            break
        count, blocks, tokens = state(fast)
        assert states[count] == (blocks, tokens)
    assert steps < 30 and fast.stats.num_accepted > 10
    drained(fast)


def run(lengths: Any = 6, accuracy: float = 1.0, **params: Any) -> tuple[Any, SpeculativeEngine]:
    engine = SpeculativeEngine(
        RowsModel(),  # type: ignore[arg-type]
        EngineConfig(block_size=4, num_blocks=64),
        proposer=Oracle(3, accuracy),
        lengths=lengths,
    )
    (output,) = engine.generate([[9, 2, 6]], SamplingParams(**params))
    drained(engine)
    return output, engine


def test_a_stop_token_inside_a_draft_ends_the_request_there() -> None:
    right = expected_tokens([9, 2, 6], 40)
    for place in range(1, 12):
        stop = right[place]
        cut = right[: right.index(stop) + 1]
        for seed_length in (3, 6):
            output, _ = run(lengths=seed_length, max_tokens=40, stop_token_ids=(stop,))
            assert output.token_ids == cut and output.finish_reason == "stop"


def test_max_tokens_inside_a_draft_is_kept() -> None:
    for count in range(1, 14):
        output, engine = run(max_tokens=count)
        assert output.token_ids == expected_tokens([9, 2, 6], count)
        assert output.finish_reason == "length"
        assert engine.stats.num_drafted <= count, "drafts that could never be emitted"


def test_logits_that_are_not_finite_end_the_request_at_that_token() -> None:
    right = expected_tokens([9, 2, 6], 20)
    model = RowsModel()
    model.nan_for = right[7]
    engine = SpeculativeEngine(
        model,  # type: ignore[arg-type]
        EngineConfig(block_size=4, num_blocks=64),
        proposer=Oracle(3, 1.0),
        lengths=6,
    )
    (output,) = engine.generate([[9, 2, 6]], SamplingParams(max_tokens=20))
    assert output.finish_reason == "error" and "finite" in str(output.error)
    assert output.token_ids == right[: right.index(right[7])]
    drained(engine)


def test_a_failing_step_ends_its_requests_and_frees_their_drafts() -> None:
    model = RowsModel()
    engine = SpeculativeEngine(
        model,  # type: ignore[arg-type]
        EngineConfig(block_size=2, num_blocks=64),
        proposer=Oracle(3, 1.0),
        lengths=6,
    )
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=30))
    engine.step()
    engine.step()
    model.failures = 1
    (output,) = engine.step()
    assert output.finish_reason == "error" and "injected failure" in str(output.error)
    drained(engine)


def test_drafts_use_only_what_is_spare() -> None:
    """A pool that is nearly full and a budget that is nearly used up: fewer drafts, same tokens."""
    steps: list[SpeculativeStep] = []
    engine = SpeculativeEngine(
        RowsModel(),  # type: ignore[arg-type]
        EngineConfig(block_size=2, num_blocks=23, max_num_batched_tokens=6, watermark=0.0),
        proposer=Oracle(5, 1.0),
        lengths=7,
        on_step=lambda record: steps.append(record.step),  # type: ignore[arg-type]
    )
    prompts = [[1], [2], [3]]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=14))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == expected_tokens(prompt, 14)
        assert output.metrics.num_preemptions == 0, "drafts must not cost anybody its blocks"
    assert all(step.num_tokens <= 6 for step in steps)
    assert engine.stats.num_accepted > 0
    drained(engine)


def test_a_pool_below_its_watermark_gets_no_drafts() -> None:
    drafted = {}
    for watermark in (0.0, 0.9):
        engine = SpeculativeEngine(
            RowsModel(),  # type: ignore[arg-type]
            EngineConfig(block_size=2, num_blocks=30, watermark=watermark),
            proposer=Oracle(5, 1.0),
            lengths=4,
        )
        (output,) = engine.generate([[1]], SamplingParams(max_tokens=20))
        assert output.token_ids == expected_tokens([1], 20)
        drafted[watermark] = engine.stats.num_drafted
    # Below the mark, drafts fit only into what is left of a block that is there anyway.
    assert drafted[0.0] > 2 * drafted[0.9]


# ---- real models -------------------------------------------------------------------------------

TEXT = [(13 * i) % 50 for i in range(40)] * 2
PROMPTS = [TEXT, TEXT[5:60], [7, 8, 9] * 9, [(i * i) % 500 for i in range(33)]]


def proposers(model: Transformer) -> dict[str, Any]:
    return {
        "lookup": PromptLookupProposer(),
        "layers": lambda e: LayerSkipProposer(model, 1, e.cache, e.scheduler.blocks),
        "layers_greedy": lambda e: LayerSkipProposer(
            model, 1, e.cache, e.scheduler.blocks, sample=False
        ),
        "small": SmallModelProposer(first_layers(model, 1), model, 64, 8),
        "small_no_room": SmallModelProposer(first_layers(model, 1), model, 14, 8),
    }


@pytest.mark.parametrize("name", ["lookup", "layers", "small", "small_no_room"])
def test_greedy_tokens_of_a_real_model_are_those_of_plain_decoding(
    tiny: Transformer, name: str
) -> None:
    params = [SamplingParams(max_tokens=n) for n in (24, 7, 30, 16)]
    config = EngineConfig(block_size=8, num_blocks=80, max_num_batched_tokens=64)
    right = [o.token_ids for o in Engine(tiny, config).generate(PROMPTS, params)]
    engine = SpeculativeEngine(tiny, config, proposer=proposers(tiny)[name], lengths=4)
    found = [o.token_ids for o in engine.generate(PROMPTS, params)]
    assert found == right
    assert engine.stats.num_drafted > 0
    drained(engine)
    if isinstance(engine.proposer, SmallModelProposer):
        engine.proposer.check_invariants()
        assert engine.proposer.blocks.num_seqs == 0, "the draft's pool leaks"


@pytest.mark.parametrize("name", ["lookup", "layers_greedy"])
def test_sampled_tokens_are_identical_when_nothing_random_chose_the_draft(
    tiny: Transformer, name: str
) -> None:
    params = [SamplingParams(max_tokens=20, temperature=0.4, top_k=20, seed=s) for s in range(4)]
    config = EngineConfig(block_size=8, num_blocks=80)
    right = [o.token_ids for o in Engine(tiny, config).generate(PROMPTS, params)]
    engine = SpeculativeEngine(tiny, config, proposer=proposers(tiny)[name], lengths=4)
    assert [o.token_ids for o in engine.generate(PROMPTS, params)] == right
    assert engine.stats.num_drafted > 0


def test_a_draft_with_all_layers_is_always_accepted(tiny: Transformer) -> None:
    layers = tiny.config.num_hidden_layers
    for make in (
        lambda e: LayerSkipProposer(tiny, layers, e.cache, e.scheduler.blocks),
        lambda e: SmallModelProposer(tiny, tiny, 64, 8),
    ):
        engine = SpeculativeEngine(
            tiny, EngineConfig(block_size=8, num_blocks=80), proposer=make, lengths=3
        )
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=17, temperature=temperature, seed=5)
            engine.generate(PROMPTS[:2], params)
        assert engine.stats.acceptance_rate == 1.0
        assert engine.stats.tokens_per_verification > 3.0


def test_a_small_model_goes_back_to_where_its_guesses_were_wrong(tiny: Transformer) -> None:
    """After any history it drafts what one without a history drafts."""
    dice, small = random.Random(2), first_layers(tiny, 1)
    old = SmallModelProposer(small, tiny, 64, 8)
    request = Request("r", [(7 * i) % 300 for i in range(21)])
    rejected = 0
    for _ in range(25):
        limit = dice.randint(1, 5)
        (draft,) = old.propose([request], [limit])
        (fresh,) = SmallModelProposer(small, tiny, 64, 8).propose([request], [limit])
        assert draft.token_ids == fresh.token_ids and len(draft.token_ids) == limit
        kept = dice.randint(0, limit)
        rejected += limit - kept
        request.output_token_ids += [*draft.token_ids[:kept], dice.randrange(500)]
        old.check_invariants()
    assert rejected > 20


@pytest.mark.parametrize("lengths", ["stepwise", "adaptive"])
def test_mixed_lengths_and_sampling_share_a_batch(tiny: Transformer, lengths: str) -> None:
    made = (
        StepwiseLength(longest=6, first=2)
        if lengths == "stepwise"
        else AdaptiveLength(SpeculationCost(step=1.0, token=0.01), longest=6)
    )
    params = [
        SamplingParams(max_tokens=18),
        SamplingParams(max_tokens=12, temperature=0.7, seed=1),
        SamplingParams(max_tokens=25),
        SamplingParams(max_tokens=9, temperature=1.0, top_p=0.8, seed=2),
    ]
    config = EngineConfig(block_size=8, num_blocks=80)
    alone = [Engine(tiny, config).generate([p], q)[0].token_ids for p, q in zip(PROMPTS, params)]  # noqa: B905
    seen: set[int] = set()
    engine = SpeculativeEngine(
        tiny, config, proposer=proposers(tiny)["lookup"], lengths=made,
        on_step=lambda record: seen.update(record.step.drafts),  # type: ignore[attr-defined]
    )  # fmt: skip
    assert [o.token_ids for o in engine.generate(PROMPTS, params)] == alone
    assert len(seen) > 2


def test_a_quantised_cache_and_another_vocabulary_are_refused(tiny: Transformer) -> None:
    with pytest.raises(InvalidRequestError, match="rolled back"):
        SpeculativeEngine(
            tiny, EngineConfig(num_blocks=8, kv_dtype="int8"), proposer=PromptLookupProposer()
        )
    with pytest.raises(InvalidRequestError, match="same vocabulary"):
        SmallModelProposer(tiny, RowsModel(), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_layers"):
        first_layers(tiny, 3)
