"""Sampling: parameters, distribution, and independence of what runs beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.request import INVALID_TOKEN, Request, SamplingParams
from ch15_helpers.serving.sampling import (
    derive_seed,
    sample,
    splitmix64,
    token_weights,
    uniform,
)

VOCAB = 40


def request(seed: int = 0, position: int = 3, **params: object) -> Request:
    return Request("r", [1] * position, SamplingParams(**params), seed=seed)  # type: ignore[arg-type]


def logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of the reference generator with state 0: it hashes 0, gamma, 2 gamma, ...
    gamma = 0x9E3779B97F4A7C15
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(gamma) == 0x6E789E6AA1B965F4
    assert splitmix64(2 * gamma % 2**64) == 0x06C45D188009454F


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for numbers in (
        [uniform(7, position) for position in range(20_000)],
        [uniform(seed, 7) for seed in range(20_000)],
    ):
        assert min(numbers) >= 0 and max(numbers) < 1
        counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
        assert _chi_square(counts, np.full(20, 1000.0)) < _limit(19)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert derive_seed(0, 1) != derive_seed(1, 0)
    assert uniform(-5, 2) == uniform(2**64 - 5, 2)  # any whole number is a seed


def test_greedy_is_the_largest_logit_and_the_first_of_equals() -> None:
    scores = logits(3)
    scores[1, [4, 9]] = 50.0
    tokens = sample(scores, [request()] * 3)
    assert tokens[1] == 4
    assert [tokens[0], tokens[2]] == scores[[0, 2]].argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 12, "top_p": 0.6},
    ],
    ids=str,
)
def test_samples_follow_the_distribution(params: dict[str, float]) -> None:
    draws = 20_000
    scores = logits(1)
    probabilities = _reference(scores[0].double().numpy(), **params)  # type: ignore[arg-type]
    rows = [request(seed=seed, **params) for seed in range(draws)]
    counts = np.bincount(sample(scores.expand(draws, -1), rows), minlength=VOCAB)
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities * draws
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    predicted = np.append(expected[often], expected[~often].sum())
    if predicted[-1] == 0:
        observed, predicted = observed[:-1], predicted[:-1]
    assert _chi_square(observed, predicted) < _limit(len(observed) - 1)


def test_a_row_draws_the_same_token_in_any_company() -> None:
    scores = logits(60, vocab=300, seed=3)
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 1.1, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    ]
    rows = [request(seed=i, position=1 + i % 7, **kinds[i % 5]) for i in range(60)]
    alone = [sample(scores[i : i + 1], [rows[i]])[0] for i in range(60)]
    assert sample(scores, rows) == alone
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    assert sample(scores[order], [rows[i] for i in order]) == [alone[i] for i in order]
    assert len(set(alone)) > 20


def test_seed_and_position_decide() -> None:
    scores = logits(1).expand(200, -1)
    same = sample(scores, [request(seed=5, temperature=1.0)] * 200)
    assert len(set(same)) == 1
    by_position = [request(seed=5, position=p, temperature=1.0) for p in range(1, 201)]
    assert len(set(sample(scores, by_position))) > 8


def test_limits_of_the_parameters_are_greedy() -> None:
    scores = logits(30, seed=9)
    best = scores.argmax(-1).tolist()
    for params in (
        {"temperature": 1e-300},
        {"temperature": 1e-4},
        {"temperature": 5.0, "top_k": 1},
        {"temperature": 5.0, "top_p": 1e-9},
    ):
        rows = [request(seed=i, **params) for i in range(30)]
        assert sample(scores, rows) == best, params
    everything = token_weights(scores[:1], [request(temperature=1.0, top_k=10 * VOCAB)])
    assert (everything > 0).all()


def test_ties_at_the_edge_of_top_k_and_top_p_are_kept() -> None:
    scores = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert _kept(scores, top_k=2) == [0, 1, 2, 3]
    assert _kept(scores, top_k=1) == [0]
    assert _kept(scores, top_p=0.5) == [0, 1, 2, 3]  # 0 has 46 %, any of 1, 2, 3 may be next
    assert _kept(scores, top_p=0.4) == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_invalidate_their_row_only(
    bad: float, temperature: float
) -> None:
    scores = logits(3)
    rows = [request(seed=i, temperature=temperature) for i in range(3)]
    before = sample(scores, rows)
    scores[1, 17] = bad
    assert sample(scores, rows) == [before[0], INVALID_TOKEN, before[2]]
    scores[1] = -math.inf
    assert sample(scores, rows)[1] == INVALID_TOKEN


def test_masked_tokens_are_never_drawn() -> None:
    scores = logits(1)
    scores[0, ::2] = -math.inf
    rows = [request(seed=i, temperature=2.0) for i in range(500)]
    drawn = sample(scores.expand(500, -1), rows)
    assert {token % 2 for token in drawn} == {1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", 1.5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
    ],
)
def test_bad_parameters_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is .*must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_stop_tokens_may_come_as_a_list() -> None:
    params = SamplingParams(stop_token_ids=[3, 4])  # type: ignore[arg-type]
    assert params.stop_token_ids == (3, 4) and hash(params)


def _kept(scores: torch.Tensor, **params: object) -> list[int]:
    weights = token_weights(scores, [request(temperature=1.0, **params)])
    kept: list[int] = weights[0].nonzero()[:, 0].tolist()
    return kept


def _reference(
    scores: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
    """The same distribution, written the slow way."""
    order = np.argsort(-scores)
    probabilities = np.exp((scores - scores.max()) / temperature)
    keep = order[:top_k] if top_k else order
    masked = np.zeros_like(probabilities)
    masked[keep] = probabilities[keep]
    masked /= masked.sum()
    total, nucleus = 0.0, []
    for token in order:
        nucleus.append(token)
        total += masked[token]
        if total >= top_p:
            break
    result = np.zeros_like(masked)
    result[nucleus] = masked[nucleus]
    return result / result.sum()


def _chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def _limit(degrees: int) -> float:
    """Chi-square value that chance exceeds once in 10,000 (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
