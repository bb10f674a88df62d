"""Sampling on the GPU: against float64, whichever way a row is split. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.kernels.sampling import (
    INVALID_TOKEN,
    kept_weights,
    sample_tokens,
    sample_tokens_torch,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 8, 1.0), (1.3, 0, 0.8), (1.0, 50, 0.6),
            (1.0, 1, 1.0), (1.0, 0, 1e-9), (5.0, 10**6, 0.999), (1e-4, 0, 0.9)]  # fmt: skip


def arguments(logits, rows=None):
    rows = range(logits.shape[0]) if rows is None else rows
    picked = [SETTINGS[row % len(SETTINGS)] for row in rows]
    temperatures, top_ks, top_ps = zip(*picked, strict=True)
    return (
        logits,
        torch.tensor(temperatures, device="cuda"),
        torch.tensor(top_ks, dtype=torch.int32, device="cuda"),
        torch.tensor(top_ps, device="cuda"),
        torch.tensor([row * 7919 - 3 for row in rows], device="cuda"),
        torch.tensor([row % 11 for row in rows], device="cuda"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 1237, 49152, 128256])
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_tokens_are_those_of_the_float64_reference(rows, vocab, dtype):
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = (3 * torch.randn(rows, vocab, generator=generator, device="cuda")).to(dtype)
    given = arguments(logits)
    drawn, reference = sample_tokens(*given), sample_tokens_torch(*given)
    # Weights of 24 bits may move an edge past a draw: about one draw in a million.
    assert (drawn != reference).sum() <= 1
    weights = kept_weights(*given[:4]).gather(1, drawn[:, None])[:, 0]
    assert (weights > 0).sum() >= rows - 1


def test_a_row_draws_the_same_token_however_it_is_split():
    from ch15_helpers.kernels.sampling_triton import sample_tokens_triton

    logits = torch.randn(40, 128256, device="cuda")
    given = arguments(logits)
    together = sample_tokens_triton(*given, splits=1)
    for splits in (2, 4):
        few = [tensor[: 132 // splits] for tensor in given]
        assert torch.equal(sample_tokens_triton(*few, splits=splits), together[: 132 // splits])
    alone = [int(sample_tokens(*arguments(logits[i : i + 1], [i]))) for i in range(40)]
    assert alone == together.tolist()


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.7, 8, 1.0), (1.3, 0, 0.8), (1.0, 12, 0.6)])
def test_draws_follow_the_distribution(setting):
    draws, vocab = 40_000, 64
    row = 2 * torch.randn(1, vocab, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    temperatures = torch.full((draws,), setting[0], device="cuda")
    top_ks = torch.full((draws,), setting[1], dtype=torch.int32, device="cuda")
    top_ps = torch.full((draws,), setting[2], device="cuda")
    seeds = torch.arange(draws, device="cuda")
    logits = row.expand(draws, -1)
    ids = sample_tokens(logits, temperatures, top_ks, top_ps, seeds, torch.full_like(seeds, 5))
    weights = kept_weights(row, temperatures[:1], top_ks[:1], top_ps[:1])[0]
    expected = weights / weights.sum() * draws
    counts = torch.bincount(ids, minlength=vocab).double()
    assert not counts[expected == 0].any()
    often = expected >= 5
    chi_square = ((counts - expected)[often].square() / expected[often]).sum()
    degrees = int(often.sum()) - 1
    assert chi_square < degrees + 4.5 * (2 * degrees) ** 0.5 + 5


def test_ties_are_kept_masked_tokens_are_not_and_bad_rows_are_marked():
    scores = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]], device="cuda").expand(900, -1)
    same = [torch.full((900,), value, device="cuda") for value in (1.0, 2, 1.0)]
    seeds, zero = (
        torch.arange(900, device="cuda"),
        torch.zeros(900, dtype=torch.int64, device="cuda"),
    )
    drawn = sample_tokens(scores, same[0], same[1].int(), same[2], seeds, zero)
    assert set(drawn.tolist()) == {0, 1, 2, 3}
    drawn = sample_tokens(scores, same[0], same[1].int() * 0, same[2] / 2, seeds, zero)
    assert set(drawn.tolist()) == {0, 1, 2, 3}  # 0 has 46 %, any of 1, 2, 3 may be next
    logits = torch.randn(18, 5000, device="cuda")
    logits[:, ::2] = -float("inf")
    before = sample_tokens(*arguments(logits))
    assert (before % 2 == 1).all()
    logits[2, 17], logits[9, 18], logits[4, 19] = float("nan"), float("nan"), float("inf")
    logits[16] = -float("inf")
    bad = torch.tensor([row in (2, 4, 9, 16) for row in range(18)], device="cuda")
    expected = torch.where(bad, INVALID_TOKEN, before)
    assert torch.equal(sample_tokens(*arguments(logits)), expected)


def test_a_captured_call_waits_for_nothing_and_replays_with_new_logits():
    logits = torch.randn(3, 49152, device="cuda")
    given = arguments(logits, [1, 3, 4])
    sample_tokens(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sample_tokens(*given)
    for _ in range(3):
        logits.normal_()
        given[5].add_(1)
        graph.replay()
        assert torch.equal(ids, sample_tokens_torch(*given))
