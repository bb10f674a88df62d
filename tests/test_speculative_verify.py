"""Sampled speculation is exact: chi-square against the target's own distribution; and lengths."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ch15_helpers import EngineConfig, SamplingParams
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.request import INVALID_TOKEN, Request
from ch15_helpers.serving.sampling import pick, token_weights
from ch15_helpers.speculative.draft_model import LayerSkipProposer, SmallModelProposer, first_layers
from ch15_helpers.speculative.engine import SpeculativeEngine
from ch15_helpers.speculative.lengths import (
    AdaptiveLength,
    FixedLength,
    SpeculationCost,
    StepwiseLength,
    expected_tokens,
)
from ch15_helpers.speculative.proposers import PromptLookupProposer
from ch15_helpers.speculative.verify import (
    DRAFT_STREAM,
    AcceptanceStats,
    Draft,
    stream_uniform,
    verify,
)

SIZE = 5  # tokens of the made-up vocabulary


def logits_after(context: Sequence[int], which: int) -> Tensor:
    """A made-up model: logits that depend on the whole context."""
    return _logits(tuple(context), which)


@functools.cache
def _logits(context: tuple[int, ...], which: int) -> Tensor:
    dice = random.Random(f"{which} {context}")
    return torch.tensor([dice.gauss(0.0, 1.2) for _ in range(SIZE)])


def chi_square(counts: Counter[tuple[int, ...]], probs: dict[tuple[int, ...], float]) -> float:
    """Standard normal equivalent of the chi-square statistic (Wilson and Hilferty, 1931).

    Cells that expect fewer than five are put together.
    """
    total = sum(counts.values())
    assert set(counts) <= {cell for cell, p in probs.items() if p > 0}, "an impossible outcome"
    cells, rest = [], [0.0, 0.0]
    for cell, p in probs.items():
        if p * total >= 5:
            cells.append((counts[cell], p * total))
        else:
            rest = [rest[0] + counts[cell], rest[1] + p * total]
    if rest[1] > 0:
        cells.append((rest[0], rest[1]))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    degrees = len(cells) - 1
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def joint(params: SamplingParams, count: int) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the first ``count`` tokens of the made-up target."""
    probs: dict[tuple[int, ...], float] = {}
    probe = Request("probe", [0], params)
    for tokens in itertools.product(range(SIZE), repeat=count):
        p = 1.0
        for position in range(count):
            weights = token_weights(logits_after(tokens[:position], 0)[None], [probe])[0]
            p *= float(weights[tokens[position]] / weights.sum())
        probs[tokens] = p
    return probs


Step = Callable[[Request, int], list[int]]


def sampled_draft(request: Request, length: int) -> Draft:
    """Drafts from another made-up model, by its own random numbers."""
    tokens: list[int] = []
    probs = []
    for offset in range(length):
        logits = logits_after([*request.output_token_ids, *tokens], 1)
        weights = token_weights(logits[None], [request])
        probs.append(weights[0] / weights.sum())
        number = stream_uniform(DRAFT_STREAM, request.seed, request.num_tokens + offset)
        tokens.append(int(pick(weights, [number])))
    return Draft(tokens, torch.stack(probs))


def outcomes(
    seeds: range, params: SamplingParams, count: int, draft: Callable[[Request, int], Draft],
    check: Callable[[Tensor, Sequence[Request], Sequence[Draft]], list[list[int]]] = verify,
) -> tuple[Counter[tuple[int, ...]], AcceptanceStats]:  # fmt: skip
    """The first ``count`` tokens for each seed, by drafting and verifying."""
    counts: Counter[tuple[int, ...]] = Counter()
    stats = AcceptanceStats()
    for seed in seeds:
        request = Request("r", [0], params, seed=seed)
        while len(request.output_token_ids) < count:
            made = draft(request, 1 + seed % 3)
            known = request.output_token_ids
            rows = [logits_after([*known, *made.token_ids[:i]], 0)
                    for i in range(len(made.token_ids) + 1)]  # fmt: skip
            tokens = check(torch.stack(rows), [request], [made])[0]
            stats.record(len(made.token_ids), len(tokens) - 1)
            known += tokens
        counts[tuple(request.output_token_ids[:count])] += 1
    return counts, stats


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.3, top_p=0.8),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_rejection_sampling_has_the_targets_distribution(params: SamplingParams) -> None:
    probs = joint(params, 3)
    for block in range(2):
        seeds = range(10**6 * block, 10**6 * block + 900)
        counts, stats = outcomes(seeds, params, 3, sampled_draft)
        assert chi_square(counts, probs) < 4.0
        assert 0.2 < stats.acceptance_rate < 0.9, "everything or nothing was accepted: no test"


def test_drafts_without_probabilities_have_it_too_and_equal_plain_sampling() -> None:
    params = SamplingParams(temperature=1.0)

    def greedy(request: Request, length: int) -> Draft:
        tokens: list[int] = []
        for _ in range(length):
            logits = logits_after([*request.output_token_ids, *tokens], 1)
            tokens.append(int(logits.argmax()))
        return Draft(tokens)

    counts, stats = outcomes(range(2000), params, 3, greedy)
    plain, _ = outcomes(range(2000), params, 3, lambda request, length: Draft())
    assert counts == plain, "the same random numbers give the same tokens"
    assert chi_square(counts, joint(params, 3)) < 4.0
    assert stats.acceptance_rate > 0.1


def test_sampled_drafts_are_accepted_as_often_as_the_theory_says() -> None:
    """The probability of acceptance is the overlap of p and q (Leviathan et al., 2023)."""
    params = SamplingParams(temperature=1.0)
    p, q = (logits_after([], which).double().softmax(0) for which in (0, 1))
    overlap = float(torch.minimum(p, q).sum())
    accepted = 0
    for seed in range(2500):
        request = Request("r", [0], params, seed=seed)
        draft = sampled_draft(request, 1)
        rows = torch.stack([logits_after([], 0), logits_after(draft.token_ids, 0)])
        accepted += len(verify(rows, [request], [draft])[0]) == 2
    deviation = math.sqrt(overlap * (1 - overlap) / 2500)
    assert abs(accepted / 2500 - overlap) < 4 * deviation


def test_the_test_bites() -> None:
    """Accepting every draft, or resampling from p instead of the remainder, is found out."""
    params = SamplingParams(temperature=1.0)
    probs = joint(params, 3)

    def everything(
        logits: Tensor, requests: Sequence[Request], drafts: Sequence[Draft]
    ) -> list[list[int]]:
        last = int(pick(token_weights(logits[-1:], requests), [0.5]))
        return [[*drafts[0].token_ids, last]]

    def from_p(
        logits: Tensor, requests: Sequence[Request], drafts: Sequence[Draft]
    ) -> list[list[int]]:
        (request,), tokens = requests, verify(logits, requests, drafts)[0]
        if len(tokens) <= len(drafts[0].token_ids):
            row = len(tokens) - 1
            number = stream_uniform(99, request.seed, request.num_tokens + row)
            tokens[-1] = int(pick(token_weights(logits[row : row + 1], requests), [number]))
        return [tokens]

    for wrong in (everything, from_p):
        counts, _ = outcomes(range(1500), params, 3, sampled_draft, wrong)
        with_wrong = chi_square(counts, probs)
        assert with_wrong > 6.0, wrong.__name__


@pytest.mark.parametrize("kind", ["layers", "small"])
def test_the_engine_samples_from_the_targets_distribution(tiny: Transformer, kind: str) -> None:
    """Tokens 2 and 3 of a real model, from a draft of its first layer."""
    prompt, params = [5, 17, 100, 42], SamplingParams(max_tokens=3, temperature=1.0, top_k=3)
    make = {
        "layers": lambda e: LayerSkipProposer(tiny, 1, e.cache, e.scheduler.blocks),
        "small": lambda e: SmallModelProposer(first_layers(tiny, 1), tiny, 200, 8),
    }[kind]
    config = EngineConfig(block_size=8, num_blocks=256, seed=11)
    engine = SpeculativeEngine(tiny, config, proposer=make, lengths=2)
    outputs = engine.generate([prompt] * 1500, params)
    counts = Counter(tuple(output.token_ids) for output in outputs)
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    probe = Request("probe", prompt, params)
    for _ in range(3):
        grown: dict[tuple[int, ...], float] = {}
        contexts = torch.tensor([[*prompt, *tokens] for tokens in probs])
        weights = token_weights(tiny.forward_dense(contexts)[:, -1], [probe] * len(contexts))
        for (tokens, p), row in zip(probs.items(), weights / weights.sum(-1, True), strict=True):
            for token in row.nonzero()[:, 0].tolist():
                grown[(*tokens, token)] = p * float(row[token])
        probs = grown
    assert chi_square(counts, probs) < 4.0
    assert 0.02 < engine.stats.acceptance_rate < 0.98


def test_logits_that_are_not_finite_end_the_tokens() -> None:
    for temperature, probs in ((0.0, None), (1.0, None), (1.0, torch.full((2, SIZE), 0.2))):
        request = Request("r", [0], SamplingParams(temperature=temperature), seed=1)
        rows = torch.zeros(3, SIZE)
        rows[:, 2] = 50.0
        rows[1, 3] = torch.nan
        rows[0, 2] = 1000.0
        tokens = verify(rows, [request], [Draft([2, 2], None if probs is None else probs.double())])
        assert tokens == [[2, INVALID_TOKEN]]


# ---- prompt lookup -----------------------------------------------------------------------------


def lookup(tokens: list[int], limit: int, longest: int = 3, shortest: int = 1) -> list[int]:
    proposer = PromptLookupProposer(longest, shortest)
    return proposer.propose([Request("r", tokens)], [limit])[0].token_ids


def slow_lookup(tokens: list[int], limit: int, longest: int, shortest: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                period = tokens[end:]
                return [period[i % len(period)] for i in range(limit)]
    return []


def test_lookup_finds_what_a_search_finds() -> None:
    assert lookup([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert lookup([7, 7], 4) == [7, 7, 7, 7], "a loop is drafted in full"
    assert lookup([1, 2, 3], 4) == [] and lookup([1, 1], 0) == []
    dice = random.Random(0)
    for _ in range(300):
        tokens = [dice.randrange(4) for _ in range(dice.randint(1, 30))]
        longest = dice.randint(1, 4)
        shortest = dice.randint(1, longest)
        limit = dice.randint(1, 6)
        expected = slow_lookup(tokens, limit, longest, shortest)
        assert lookup(tokens, limit, longest, shortest) == expected


def test_lookup_goes_on_where_it_was_and_forgets_what_ended() -> None:
    proposer, dice = PromptLookupProposer(), random.Random(1)
    request = Request("r", [dice.randrange(3) for _ in range(5)])
    for _ in range(60):
        tokens = request.tokens(0, request.num_tokens)
        assert proposer.propose([request], [3])[0].token_ids == slow_lookup(tokens, 3, 3, 1)
        request.output_token_ids.append(dice.randrange(3))
    proposer.forget("r")
    proposer.forget("r")
    other = Request("r", [1, 2])
    assert proposer.propose([other], [3])[0].token_ids == []
    with pytest.raises(ValueError, match="shortest"):
        PromptLookupProposer(2, 3)


# ---- lengths -----------------------------------------------------------------------------------


def test_expected_tokens_match_a_simulation() -> None:
    dice = random.Random(0)
    for acceptance, length in ((0.0, 4), (0.5, 3), (0.8, 5), (1.0, 4)):
        total = 0
        for _ in range(10000):
            count = 0
            while count < length and dice.random() < acceptance:
                count += 1
            total += count + 1
        assert total / 10000 == pytest.approx(expected_tokens(acceptance, length), abs=0.08)
    with pytest.raises(ValueError, match="acceptance"):
        expected_tokens(1.5, 2)


def test_speculation_loses_in_large_batches() -> None:
    cost = SpeculationCost(step=1.0, token=0.02, draft_step=0.1)
    gains = [cost.speedup(0.6, 4, batch) for batch in (1, 8, 32, 128, 512)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 1 > gains[-1]
    best = [cost.best_length(0.6, batch, 8) for batch in (1, 8, 32, 128, 512)]
    assert best == sorted(best, reverse=True) and best[0] >= 2 and best[-1] == 0
    free = SpeculationCost(step=1.0, token=0.0)
    assert free.best_length(0.9, 1000, 8) == 8, "what costs nothing is always worth it"
    assert free.best_length(0.0, 1, 8) == 0


def test_adaptive_length_follows_acceptance_and_keeps_probing() -> None:
    lengths = AdaptiveLength(SpeculationCost(step=1.0, token=0.05, draft_step=0.1), longest=6)
    first = lengths.length("a", 1)
    for _ in range(30):
        lengths.record("a", 4, 4)
        lengths.record("b", 4, 0)
    assert lengths.length("a", 1) == 6 > first >= 1
    assert lengths.acceptance("b") < 0.2
    asked = [lengths.length("b", 1) for _ in range(32)]
    assert sorted(asked) == [0] * 30 + [1] * 2, "one probe in 16 steps"
    lengths.forget("a")
    assert lengths.length("a", 1) < 6


def test_stepwise_length_grows_by_two_and_shrinks_by_one() -> None:
    lengths = StepwiseLength(longest=6, first=3)
    seen = []
    for drafted, accepted in ((3, 3), (5, 5), (6, 6), (6, 2), (5, 0), (0, 0)):
        lengths.record("r", drafted, accepted)
        seen.append(lengths.length("r", 1))
    assert seen == [5, 6, 6, 5, 4, 4]
    assert FixedLength(3).length("x", 9) == 3
    with pytest.raises(ValueError, match="negative"):
        FixedLength(-1)
    with pytest.raises(ValueError, match="shortest"):
        StepwiseLength(longest=2, first=4)


def test_statistics_count_only_drafts_that_were_tried() -> None:
    stats = AcceptanceStats()
    for drafted, accepted in ((4, 4), (4, 1), (2, 0), (0, 0)):
        stats.record(drafted, accepted)
    assert (stats.num_verifications, stats.num_drafted, stats.num_accepted) == (3, 10, 5)
    assert stats.tried == [3, 2, 1, 1] and stats.accepted == [2, 1, 1, 1]
    assert stats.acceptance_rate == pytest.approx(5 / 7)
    assert stats.tokens_per_verification == pytest.approx(8 / 3)
