"""Sampling next tokens where the logits are: temperature, top-k, top-p, nothing asked of the host.

The number behind a draw is a pure function of a request's seed and the token's position
(splitmix64, Steele et al., OOPSLA 2014), and a token is found by inverting the cumulative
distribution in vocabulary order. A row therefore draws the same token in any batch.

Bytes: a greedy row reads its logits once. A row with a temperature reads them two more times, and
once for each cut of the search for its last kept token (see ``sampling_triton``); those reads come
from the cache. Operations are few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton

INVALID_TOKEN = -1  # of a row whose largest logit is not finite
_MAX_VOCAB = 1 << 19  # of the Triton kernel, whose sums are exact up to there
_ROWS_AT_ONCE = 64  # bounds the float64 temporaries: 64 rows of a 128k vocabulary are 64 MiB
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def sample_tokens(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Next token of each row. All tensors are on one device; nothing waits for it.

    Temperature, top-k and top-p apply in this order. Tokens that tie with the last one kept are
    kept too, so that the outcome does not depend on how a device sorts them.

    Args:
        logits: [rows, vocab], float32, bfloat16 or float16; not modified.
        temperatures: floating point [rows]; 0 is greedy, the first of equal logits.
        top_ks: int32 [rows], 0 keeps all tokens.
        top_ps: floating point [rows], in (0, 1]; 1 keeps all tokens.
        seeds: int64 [rows], see :func:`signed64`.
        offsets: int64 [rows], position of the token to draw.

    Returns:
        int64 [rows], ``INVALID_TOKEN`` for a row with a NaN, or whose largest logit is infinite.
    """
    arguments = (logits, temperatures, top_ks, top_ps, seeds, offsets)
    if logits.shape[0] and logits.shape[1] <= _MAX_VOCAB and use_triton(logits):
        from ch15_helpers.kernels.sampling_triton import sample_tokens_triton

        return sample_tokens_triton(*arguments)
    return sample_tokens_torch(*arguments)


def sample_tokens_torch(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> Tensor:
    """:func:`sample_tokens` in torch operations and float64: the portable reference."""
    rows, vocab = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    numbers = uniforms(seeds, offsets)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        weights = kept_weights(logits[part], temperatures[part], top_ks[part], top_ps[part])
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
        # Rounding may lift the draw to the total; the number below it is still a valid draw.
        draw = torch.minimum(numbers[part, None] * total, total.nextafter(total.new_zeros(())))
        drawn = torch.searchsorted(cumulative, draw, right=True)[:, 0].clamp(max=vocab - 1)
        best = logits[part].argmax(-1)
        chosen = torch.where(temperatures[part] > 0, drawn, best)
        finite = logits[part].amax(-1).isfinite()  # amax hands a NaN on
        ids[part] = torch.where(finite, chosen, INVALID_TOKEN)
    return ids


def kept_weights(logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """Unnormalised float64 probabilities [rows, vocab] that :func:`sample_tokens` draws from."""
    vocab = logits.shape[1]
    temperature = torch.where(temperatures > 0, temperatures, 1).double()[:, None]
    logits = logits.double()
    # On a GPU the question would wait for the answer: there every row is sorted.
    if not logits.is_cuda and not bool(((top_ks > 0) | (top_ps < 1)).any()):
        return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    ordered = logits.sort(dim=-1, descending=True).values
    limits = torch.where(top_ks > 0, top_ks, vocab).clamp(max=vocab).long()[:, None]
    last = ordered.gather(1, limits - 1)
    highest = ordered[:, :1]
    masses = ((ordered - highest) / temperature).exp().masked_fill(ordered < last, 0.0)
    mass_before = masses.cumsum(-1) - masses
    wanted = top_ps.double()[:, None] * masses.sum(-1, keepdim=True)
    kept = (mass_before < wanted).sum(-1, keepdim=True).clamp(min=1)
    last = torch.where(top_ps[:, None] < 1, ordered.gather(1, kept - 1).maximum(last), last)
    return ((logits - highest) / temperature).exp().masked_fill(logits < last, 0.0)


def uniforms(seeds: Tensor, offsets: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 bits, float64, for tokens at ``offsets`` of requests."""
    return _shift(_splitmix64(_splitmix64(seeds) ^ offsets), 11).double() * 2.0**-53


def signed64(value: int) -> int:
    """A whole number modulo 2**64 as an int64 holds it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _splitmix64(value: Tensor) -> Tensor:
    value = value + signed64(_GAMMA)
    value = (value ^ _shift(value, 30)) * signed64(_FIRST)
    value = (value ^ _shift(value, 27)) * signed64(_SECOND)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Right shift of int64 that brings zeros in, not the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
