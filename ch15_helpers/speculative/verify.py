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

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ch15_helpers.serving.request import INVALID_TOKEN, Request
from ch15_helpers.serving.sampling import greedy_ids, pick, token_weights, uniform

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


def verify(logits: Tensor, requests: Sequence[Request], drafts: Sequence[Draft]) -> list[list[int]]:
    """The tokens that each request gets: accepted drafts, then one from the model.

    Args:
        logits: float32, ``1 + len(draft)`` rows for each request in order: after its last known
            token, and after each draft.
        requests: their parameters, seeds and lengths decide.
        drafts: one for each request.

    Returns:
        For each request 1 to ``1 + len(draft)`` tokens. INVALID_TOKEN ends the list where logits
        are not finite.
    """
    choices = greedy_ids(logits).tolist()
    starts = [0]
    for draft in drafts:
        starts.append(starts[-1] + len(draft.token_ids) + 1)
    sampled = [i for i, request in enumerate(requests) if request.params.temperature > 0]
    plain = [i for i in sampled if drafts[i].probs is None]
    _sample_plainly(logits, requests, plain, starts, choices)
    results = []
    for number, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
        rows = slice(starts[number], starts[number + 1])
        if draft.probs is not None and request.params.temperature > 0:
            results.append(_reject(logits[rows], choices[rows], request, draft))
        else:
            results.append(_matching(choices[rows], draft.token_ids))
    return results


def _matching(choices: list[int], draft: list[int]) -> list[int]:
    """The model's own tokens, up to and including the first that differs from the draft."""
    count = 0
    while count < len(draft) and choices[count] == draft[count]:
        count += 1
    return choices[: count + 1]


def _sample_plainly(
    logits: Tensor,
    requests: Sequence[Request],
    which: Sequence[int],
    starts: Sequence[int],
    choices: list[int],
) -> None:
    """Put the tokens of plain sampling in the place of greedy choices, row by row."""
    rows = [(row, requests[i], row - starts[i]) for i in which for row in
            range(starts[i], starts[i + 1])]  # fmt: skip
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        group = rows[start : start + _ROWS_AT_ONCE]
        index = torch.tensor([row for row, _, _ in group], device=logits.device)
        owners = [request for _, request, _ in group]
        numbers = [uniform(r.seed, r.num_tokens + offset) for _, r, offset in group]
        drawn = pick(token_weights(logits[index], owners), numbers).tolist()
        for (row, _, _), token in zip(group, drawn, strict=True):
            if choices[row] != INVALID_TOKEN:
                choices[row] = token


def _reject(logits: Tensor, greedy: list[int], request: Request, draft: Draft) -> list[int]:
    """Rejection sampling over one request's drafts."""
    assert draft.probs is not None
    weights = token_weights(logits, [request] * len(logits))
    target = weights / weights.sum(-1, keepdim=True)
    index = torch.tensor(draft.token_ids, device=logits.device)[:, None]
    p = target[:-1].gather(1, index)[:, 0].tolist()
    q = draft.probs.gather(1, index)[:, 0].tolist()
    tokens: list[int] = []
    for offset, token in enumerate(draft.token_ids):
        if greedy[offset] == INVALID_TOKEN:
            return [*tokens, INVALID_TOKEN]
        position = request.num_tokens + offset
        if stream_uniform(ACCEPT_STREAM, request.seed, position) * q[offset] < p[offset]:
            tokens.append(token)
            continue
        remainder = (target[offset] - draft.probs[offset]).clamp(min=0)
        if not remainder.any():  # p = q up to rounding: nothing was wrong with the draft
            remainder = target[offset]
        number = stream_uniform(REMAINDER_STREAM, request.seed, position)
        return [*tokens, int(pick(remainder[None], [number]))]
    if greedy[-1] == INVALID_TOKEN:
        return [*tokens, INVALID_TOKEN]
    number = uniform(request.seed, request.num_tokens + len(tokens))
    return [*tokens, int(pick(target[-1:], [number]))]


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
