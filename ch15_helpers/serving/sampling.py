"""From logits to tokens, so that a request's tokens never depend on what runs beside it.

Randomness is counter-based: the uniform number behind the token at position ``p`` of a request
is a pure function of the request's seed and ``p`` (splitmix64, Steele et al., OOPSLA 2014). A
request that is batched, preempted or moved to another machine therefore draws the same numbers.
A token is then found by inverting the cumulative distribution, in vocabulary order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.kernels.sampling import sample_tokens, signed64
from ch15_helpers.serving.request import INVALID_TOKEN, Request

_MASK = (1 << 64) - 1
_ROWS_AT_ONCE = 64  # bounds the float64 temporaries: 64 rows of a 128k vocabulary are 64 MiB


def splitmix64(value: int) -> int:
    """One step of splitmix64: a bijective hash of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(engine_seed: int, number: int) -> int:
    """Seed of an engine's ``number``-th request that brings none."""
    return splitmix64(splitmix64(engine_seed & _MASK) ^ (number & _MASK))


def uniform(seed: int, position: int) -> float:
    """Uniform number in [0, 1) with 53 bits, for the token at ``position`` of a request."""
    return (splitmix64(splitmix64(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


def greedy_ids(logits: Tensor) -> Tensor:
    """Greedy choice of each row, int64 [rows]; INVALID_TOKEN where a logit is NaN or infinite."""
    best, ids = _argmax(logits)
    return torch.where(torch.isfinite(best), ids, INVALID_TOKEN)


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Next token of each request, on the host; see ``sample_ids``."""
    tokens: list[int] = sample_ids(logits, requests).tolist()
    return tokens


def sample_ids(
    logits: Tensor,
    requests: Sequence[Request],
    greedy: Tensor | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """Next token of each request. On a GPU nothing waits for it.

    Greedy rows cost one argmax. The others are sampled together, after temperature, top-k and
    top-p in this order, with float64 cumulative sums.

    Args:
        logits: [len(requests), vocab], float32 or narrower, on any device; not modified.
        requests: rows in order; their parameters, seeds and lengths decide.
        greedy: ``greedy_ids(logits)``, where the step has computed it already.
        positions: of the tokens to draw; None is each request's next one.

    Returns:
        int64 [len(requests)] on the logits' device, INVALID_TOKEN for a row whose largest logit is
        not finite.
    """
    rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    places = [r.num_tokens for r in requests] if positions is None else positions
    if rows and logits.is_cuda:
        return _sample_on_device(logits, requests, places)
    if not requests:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    ids = greedy_ids(logits) if greedy is None else greedy
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        group = rows[start : start + _ROWS_AT_ONCE]
        chosen = [requests[row] for row in group]
        index = torch.tensor(group, device=logits.device)
        numbers = [uniform(requests[row].seed, places[row]) for row in group]
        drawn = pick(token_weights(logits[index], chosen), numbers)
        drawn = torch.where(ids[index] == INVALID_TOKEN, INVALID_TOKEN, drawn)
        ids = ids.index_copy(0, index, drawn)
    return ids


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A small tensor on a device; the host does not wait for what runs there."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _sample_on_device(
    logits: Tensor, requests: Sequence[Request], positions: Sequence[int]
) -> Tensor:
    """The same draws by the kernel that needs no word from the host; one copy of parameters."""
    params = [request.params for request in requests]
    columns = [
        [float(each.temperature) for each in params],
        [float(each.top_p) for each in params],
        [each.top_k for each in params],
        [signed64(request.seed) for request in requests],
        list(positions),
    ]
    host = torch.empty(5, len(requests), dtype=torch.int64, pin_memory=True)
    host[:2].view(torch.float64).copy_(torch.tensor(columns[:2], dtype=torch.float64))
    host[2:].copy_(torch.tensor(columns[2:], dtype=torch.int64))
    packed = host.to(logits.device, non_blocking=True)
    temperatures, top_ps = packed[:2].view(torch.float64)
    top_ks, seeds, offsets = packed[2:]
    return sample_tokens(logits, temperatures, top_ks.int(), top_ps, seeds, offsets)


def token_weights(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Unnormalised float64 probabilities [rows, vocab] that the requests sample from.

    Tokens that tie with the last one kept by top-k or top-p are kept too, so that the outcome
    does not depend on the order in which a device happens to sort them.
    """
    device = logits.device
    settings = [(r.params.temperature, r.params.top_k, r.params.top_p) for r in requests]
    temperature, top_k, top_p = upload(settings, device, torch.float64).T
    logits = logits.double()
    if any(request.params.top_k for request in requests):
        vocab = logits.shape[1]
        limits = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()
        widest = min(vocab, max(r.params.top_k or 1 for r in requests))
        largest = logits.topk(widest, dim=-1).values
        last = largest.gather(1, limits.clamp(max=widest)[:, None] - 1)
        dropped = (logits < last) & (top_k > 0)[:, None]
        logits = logits.masked_fill(dropped, -torch.inf)
    scaled: Tensor = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    weights = scaled.exp()
    nucleus = [row for row, request in enumerate(requests) if request.params.top_p < 1]
    if nucleus:
        index = upload(nucleus, device, torch.int64)
        part = weights[index]
        ordered = part.sort(dim=-1, descending=True).values
        mass_before = ordered.cumsum(-1) - ordered
        kept = (mass_before < top_p[index, None] * ordered.sum(-1, keepdim=True)).sum(-1)
        threshold = ordered.gather(1, kept.clamp(min=1)[:, None] - 1)
        weights[index] = part.masked_fill(part < threshold, 0.0)
    return weights


def pick(weights: Tensor, numbers: Sequence[float]) -> Tensor:
    """Invert the cumulative distribution of each row, in vocabulary order.

    Args:
        weights: float64 [rows, vocab], unnormalised.
        numbers: one in [0, 1) for each row.

    Returns:
        int64 [rows], never a token of weight 0.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    draw = upload(numbers, weights.device, torch.float64)[:, None] * total
    # Rounding may lift the draw to the total; the largest number below it is still a valid draw.
    draw = torch.minimum(draw, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose cumulative weight is larger, never one of weight 0.
    ids = torch.searchsorted(cumulative, draw, right=True)[:, 0]
    return ids.clamp(max=weights.shape[1] - 1)


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit (NaN if there is one) and its index, for each row."""
    if logits.is_cuda:
        best, ids = logits.max(dim=-1)
        return best, ids
    # numpy's argmax is vectorised, torch's on CPU is not: 93 against 990 us for 16 x 49152.
    ids = torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.gather(1, ids[:, None])[:, 0], ids
