"""Sampling in tensors: the distribution it draws from, and the same tokens as the host's way."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.kernels.sampling import (
    INVALID_TOKEN,
    kept_weights,
    sample_tokens,
    signed64,
    uniforms,
)
from ch15_helpers.serving import request as serving_request
from ch15_helpers.serving.request import Request, SamplingParams
from ch15_helpers.serving.sampling import sample, token_weights, uniform

SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 8, 1.0), (1.3, 0, 0.8), (1.0, 12, 0.6)]


def arguments(logits: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows with all settings in turn, seeds of both signs, and positions."""
    rows = range(first, first + logits.shape[0])
    temperatures, top_ks, top_ps = zip(
        *(SETTINGS[row % len(SETTINGS)] for row in rows), strict=True
    )
    return (
        logits,
        torch.tensor(temperatures, dtype=torch.float64),
        torch.tensor(top_ks, dtype=torch.int32),
        torch.tensor(top_ps, dtype=torch.float64),
        torch.tensor([signed64(row * 0x9E3779B97F4A7C15) for row in rows]),
        torch.tensor([row % 7 + 1 for row in rows]),
    )


def requests(rows: range) -> list[Request]:
    """The same rows as the host's sampler takes them."""
    made = []
    for row in rows:
        temperature, top_k, top_p = SETTINGS[row % len(SETTINGS)]
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        made.append(Request("r", [1] * (row % 7 + 1), params, seed=row * 0x9E3779B97F4A7C15))
    return made


def test_the_same_numbers_and_marks_as_on_the_host() -> None:
    seeds = [0, 1, -5, 2**63 + 11, 2**64 - 1]
    numbers = uniforms(torch.tensor([signed64(s) for s in seeds]), torch.arange(5) * 977)
    assert numbers.tolist() == [uniform(seed, 977 * i) for i, seed in enumerate(seeds)]
    assert INVALID_TOKEN == serving_request.INVALID_TOKEN


@pytest.mark.parametrize("vocab", [1, 5, 40, 1237])
def test_the_same_tokens_as_on_the_host(vocab: int) -> None:
    logits = 3 * torch.randn(150, vocab, generator=torch.Generator().manual_seed(vocab))
    assert sample_tokens(*arguments(logits)).tolist() == sample(logits, requests(range(150)))
    kept = kept_weights(*arguments(logits)[:4])[1:5]
    assert torch.equal(kept, token_weights(logits[1:5], requests(range(1, 5))))


def test_a_row_alone_draws_what_it_draws_in_company() -> None:
    logits = torch.randn(130, 300, generator=torch.Generator().manual_seed(3))
    together = sample_tokens(*arguments(logits)).tolist()
    alone = [int(sample_tokens(*arguments(logits[i : i + 1], i))) for i in range(130)]
    assert alone == together
    assert len(set(together)) > 50


def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not() -> None:
    logits = torch.randn(20, 33, generator=torch.Generator().manual_seed(4))
    before = sample_tokens(*arguments(logits)).tolist()
    for row, value in ((2, float("nan")), (5, float("nan")), (8, float("inf"))):
        logits[row, 17] = value
    logits[11] = -float("inf")
    expected = [INVALID_TOKEN if row in (2, 5, 8, 11) else before[row] for row in range(20)]
    assert sample_tokens(*arguments(logits)).tolist() == expected
