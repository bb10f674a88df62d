"""Which drafted tokens stand, so that the output is what plain decoding would have given.

Greedy requests keep drafts while each is the model's own choice: identical tokens. For sampled
ones there are two exact ways. A draft that came without probabilities (prompt lookup, a greedy
draft model) is accepted when it is the token that plain sampling would have drawn with the same
random number: identical tokens again, accepted with probability p(draft). A draft that was itself
sampled from q is accepted with probability min(1, p / q), and a rejected one is replaced by a
token from the normalised remainder max(0, p - q): the same distribution, accepted more often
(Leviathan et al., ICML 2023; Chen et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ch15_helpers.serving.request import INVALID_TOKEN, Request
from ch15_helpers.serving.sampling import (
    greedy_ids,
    pick,
    sample_ids,
    token_weights,
    uniform,
    upload,
)

# Independent streams of random numbers beside the one of plain sampling.
DRAFT_STREAM, ACCEPT_STREAM, REMAINDER_STREAM = 0x5D1, 0xACC, 0x4E3
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses at a request's next tokens.

    Attributes:
        token_ids: may be fewer than were asked for, or none.
        probs: float64 [len(token_ids), vocab], the distribution that each was sampled from; None
            where nothing random chose them.
    """

    token_ids: list[int] = field(default_factory=list)
    probs: Tensor | None = None


def stream_uniform(stream: int, seed: int, position: int) -> float:
    """Like ``uniform``, from another stream of the same request."""
    return uniform(seed ^ (stream << 40), position)


def verify(
    logits: Tensor,
    requests: Sequence[Request],
    drafts: Sequence[Draft],
    greedy: Tensor | None = None,
) -> list[list[int]]:
    """The tokens that each request gets: accepted drafts, then one from the model.

    On a GPU the host waits once; with sampled drafts once for each 64 rows.

    Args:
        logits: float32, ``1 + len(draft)`` rows for each request in order: after its last known
            token, and after each draft.
        requests: their parameters, seeds and lengths decide.
        drafts: one for each request.
        greedy: ``greedy_ids(logits)``, where the step has computed it already.

    Returns:
        For each request 1 to ``1 + len(draft)`` tokens. INVALID_TOKEN ends the list where logits
        are not finite.
    """
    starts = [0]
    for draft in drafts:
        starts.append(starts[-1] + len(draft.token_ids) + 1)
    parts = [slice(start, stop) for start, stop in pairwise(starts)]
    drawn = [d.probs is not None and r.params.temperature > 0
             for r, d in zip(requests, drafts, strict=True)]  # fmt: skip
    choices = _choices(logits, requests, parts, drawn, greedy)
    results = [
        [] if by_chance else _matching(choices[rows], draft.token_ids)
        for rows, draft, by_chance in zip(parts, drafts, drawn, strict=True)
    ]
    for group in _groups([i for i, by_chance in enumerate(drawn) if by_chance], parts):
        some = [(requests[i], drafts[i], choices[parts[i]]) for i in group]
        index = upload([row for i in group for row in range(parts[i].start, parts[i].stop)],
                       logits.device, torch.int64)  # fmt: skip
        for i, tokens in zip(group, _reject(logits[index], some), strict=True):
            results[i] = tokens
    return results


def _matching(choices: list[int], draft: list[int]) -> list[int]:
    """The model's own tokens, up to and including the first that differs from the draft."""
    count = 0
    while count < len(draft) and choices[count] == draft[count] != INVALID_TOKEN:
        count += 1
    return choices[: count + 1]


def _choices(
    logits: Tensor,
    requests: Sequence[Request],
    parts: Sequence[slice],
    drawn: Sequence[bool],
    greedy: Tensor | None,
) -> list[int]:
    """What plain decoding would choose at each row; greedy where drafts were drawn."""
    ids = greedy_ids(logits) if greedy is None else greedy
    plain = [i for i, (r, by_chance) in enumerate(zip(requests, drawn, strict=True))
             if r.params.temperature > 0 and not by_chance]  # fmt: skip
    if plain:
        rows = [row for i in plain for row in range(parts[i].start, parts[i].stop)]
        owners = [requests[i] for i in plain for _ in range(parts[i].start, parts[i].stop)]
        places = [requests[i].num_tokens + offset
                  for i in plain for offset in range(parts[i].stop - parts[i].start)]  # fmt: skip
        index = upload(rows, logits.device, torch.int64)
        ids = ids.index_copy(0, index, sample_ids(logits[index], owners, ids[index], places))
    choices: list[int] = ids.tolist()
    return choices


def _groups(which: Sequence[int], parts: Sequence[slice]) -> Iterator[list[int]]:
    """Requests of at most 64 rows together, if one alone has no more."""
    group: list[int] = []
    size = 0
    for i in which:
        rows = parts[i].stop - parts[i].start
        if group and size + rows > _ROWS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(i)
        size += rows
    if group:
        yield group


def _reject(logits: Tensor, some: Sequence[tuple[Request, Draft, list[int]]]) -> list[list[int]]:
    """Rejection sampling over drafts that were drawn, of several requests.

    Args:
        logits: the rows of all of them.
        some: each request with its draft and its greedy choices.
    """
    owners = [request for request, draft, _ in some for _ in range(len(draft.token_ids) + 1)]
    weights = token_weights(logits, owners)
    target = weights / weights.sum(-1, keepdim=True)
    lens = [len(draft.token_ids) for _, draft, _ in some]
    ends = [end - 1 for end in accumulate(length + 1 for length in lens)]
    inner = sorted(set(range(len(owners))) - set(ends))
    p_rows = target[upload(inner, logits.device, torch.int64)]
    q_rows = torch.cat([draft.probs for _, draft, _ in some if draft.probs is not None])
    tokens = upload([t for _, draft, _ in some for t in draft.token_ids], logits.device,
                    torch.int64)[:, None]  # fmt: skip
    places = [(r, r.num_tokens + i) for (r, _, _), n in zip(some, lens, strict=True)
              for i in range(n)]  # fmt: skip
    numbers = [stream_uniform(ACCEPT_STREAM, r.seed, place) for r, place in places]
    limits = upload(numbers, logits.device, torch.float64)
    stands = limits * q_rows.gather(1, tokens)[:, 0] < p_rows.gather(1, tokens)[:, 0]
    rest = (p_rows - q_rows).clamp(min=0)
    # p = q up to rounding: nothing was wrong with the draft.
    rest = torch.where(rest.any(-1, keepdim=True), rest, p_rows)
    instead = pick(rest, [stream_uniform(REMAINDER_STREAM, r.seed, place) for r, place in places])
    last = [uniform(r.seed, r.num_tokens + n) for (r, _, _), n in zip(some, lens, strict=True)]
    final = pick(target[upload(ends, logits.device, torch.int64)], last)
    found = torch.cat((torch.where(stands, -1, instead), final)).tolist()
    results, start = [], 0
    for (_, draft, greedy), length, token in zip(some, lens, found[len(places) :], strict=True):
        outcome = found[start : start + length]
        results.append(_kept(draft.token_ids, outcome, token, greedy))
        start += length
    return results


def _kept(draft: list[int], instead: list[int], final: int, greedy: list[int]) -> list[int]:
    """Drafts that stand, then what replaces the first that does not (-1: it stands)."""
    tokens: list[int] = []
    for token, other, choice in zip(draft, instead, greedy, strict=False):
        if choice == INVALID_TOKEN:
            return [*tokens, INVALID_TOKEN]
        if other != -1:
            return [*tokens, other]
        tokens.append(token)
    return [*tokens, INVALID_TOKEN if greedy[-1] == INVALID_TOKEN else final]


@dataclass(slots=True)
class AcceptanceStats:
    """What became of drafts.

    Attributes:
        num_verifications: of one request in one step, those without a draft not counted.
        num_drafted, num_accepted: tokens.
        num_emitted: tokens that the verifications yielded.
        tried, accepted: the same by position in the draft, where all before it were accepted.
    """

    num_verifications: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_emitted: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts of those that were tried: the ``a`` of ``expected_tokens``."""
        return self.num_accepted / max(1, sum(self.tried))

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that a request got from a step, on average; 1 without speculation."""
        return self.num_emitted / max(1, self.num_verifications)

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Count one verification."""
        if not num_drafted:
            return
        self.num_verifications += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_emitted += num_accepted + 1
        while len(self.tried) < num_drafted:
            self.tried.append(0)
            self.accepted.append(0)
        for position in range(min(num_drafted, num_accepted + 1)):
            self.tried[position] += 1
            self.accepted[position] += position < num_accepted
