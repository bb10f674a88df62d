"""How many tokens to draft: fixed, or adapted to what has been accepted and to what it costs.

If each draft is accepted with probability ``a``, a step that verifies ``k`` of them yields
``(1 - a**(k + 1)) / (1 - a)`` tokens (Leviathan et al., ICML 2023). Whether that pays depends on
the batch: a step that is bound by reading weights verifies for nothing, one that is bound by
arithmetic pays for every draft, and loses what is rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


def expected_tokens(acceptance: float, length: int) -> float:
    """Expected tokens of one verification of ``length`` drafts, the one it always yields included.

    Raises:
        ValueError: an acceptance outside [0, 1].
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance must be in [0, 1], got {acceptance}")
    if acceptance == 1:
        return length + 1.0
    return float((1 - acceptance ** (length + 1)) / (1 - acceptance))


@dataclass(frozen=True)
class SpeculationCost:
    """Time of steps and drafts, in any one unit.

    Attributes:
        step: of a step whatever its size: reading the weights, launching kernels.
        token: of each token in a step, where arithmetic binds.
        draft_step, draft_token: the same of one pass of the proposer; 0 for prompt lookup.
    """

    step: float
    token: float
    draft_step: float = 0.0
    draft_token: float = 0.0

    def decode(self, num_seqs: int) -> float:
        """A plain decode step."""
        return self.step + num_seqs * self.token

    def speculate(self, num_seqs: int, length: int) -> float:
        """Drafting ``length`` tokens for each sequence, and verifying them."""
        draft = length * (self.draft_step + num_seqs * self.draft_token)
        return draft + self.step + num_seqs * (length + 1) * self.token

    def speedup(self, acceptance: float, length: int, num_seqs: int) -> float:
        """Expected tokens a second against plain decoding; below 1 speculation loses."""
        tokens = expected_tokens(acceptance, length)
        return tokens * self.decode(num_seqs) / self.speculate(num_seqs, length)

    def best_length(self, acceptance: float, num_seqs: int, longest: int) -> int:
        """The draft length with the largest expected speed-up; 0 where every length loses."""
        lengths = range(longest + 1)
        return max(lengths, key=lambda k: (self.speedup(acceptance, k, num_seqs), -k))


class DraftLengths(Protocol):
    """Decides how many tokens to draft for a request, and learns from what became of them.

    Attributes:
        longest: no draft is longer.
    """

    @property
    def longest(self) -> int: ...

    def length(self, request_id: str, num_seqs: int) -> int:
        """Most tokens to draft now, with ``num_seqs`` sequences in the batch."""

    def record(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """What became of the drafts of one step."""

    def forget(self, request_id: str) -> None:
        """The request has ended."""


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        self._length = length

    @property
    def longest(self) -> int:
        """The length."""
        return self._length

    def length(self, request_id: str, num_seqs: int) -> int:
        """The same for everybody."""
        return self._length

    def record(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """Nothing is learned."""

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""


class StepwiseLength:
    """Two more after a step that accepted everything, one less after any other.

    The rule of transformers' assisted generation (Gante, 2023); needs to know no costs.
    """

    def __init__(self, longest: int = 8, first: int = 4, shortest: int = 1) -> None:
        if not 0 <= shortest <= first <= longest:
            raise ValueError(
                f"lengths must satisfy 0 <= shortest <= first <= longest, got {shortest}, {first}, "
                f"{longest}"
            )
        self.longest, self._first, self._shortest = longest, first, shortest
        self._lengths: dict[str, int] = {}

    def length(self, request_id: str, num_seqs: int) -> int:
        """The request's current length."""
        return self._lengths.get(request_id, self._first)

    def record(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """Grow or shrink."""
        if not num_drafted:
            return
        now = self.length(request_id, 1)
        if num_accepted == num_drafted:
            self._lengths[request_id] = min(self.longest, now + 2)
        else:
            self._lengths[request_id] = max(self._shortest, now - 1)

    def forget(self, request_id: str) -> None:
        """Drop its length."""
        self._lengths.pop(request_id, None)


class AdaptiveLength:
    """The length with the best expected speed-up, at the acceptance that was seen lately.

    Acceptance is estimated for each request from exponentially faded counts of drafts that were
    tried and accepted; a new request starts at the average of the others. Where no length pays,
    one draft is tried every ``probe_every`` steps, so that better times are noticed.
    """

    def __init__(
        self,
        cost: SpeculationCost,
        longest: int = 8,
        *,
        memory: float = 0.9,
        prior: float = 0.6,
        probe_every: int = 16,
    ) -> None:
        """Start with an expected acceptance of ``prior``.

        Args:
            memory: factor by which counts fade with each step that drafted, in [0, 1).
        """
        if longest < 1 or not 0 <= memory < 1 or not 0 <= prior <= 1 or probe_every < 1:
            raise ValueError(
                f"longest={longest} and probe_every={probe_every} must be at least 1, "
                f"memory={memory} in [0, 1), prior={prior} in [0, 1]"
            )
        self._cost, self.longest = cost, longest
        self._memory, self._probe_every = memory, probe_every
        self._all = (prior, 1.0)  # accepted and tried, over all requests
        self._counts: dict[str, tuple[float, float]] = {}
        self._skipped: dict[str, int] = {}

    def acceptance(self, request_id: str) -> float:
        """Estimated probability that a draft is accepted."""
        accepted, tried = self._all
        mine = self._counts.get(request_id, (0.0, 0.0))
        # The average of all counts as one try of this request.
        return (mine[0] + accepted / tried) / (mine[1] + 1.0)

    def length(self, request_id: str, num_seqs: int) -> int:
        """The best length now."""
        best = self._cost.best_length(self.acceptance(request_id), num_seqs, self.longest)
        if best:
            return best
        skipped = self._skipped.get(request_id, 0) + 1
        self._skipped[request_id] = skipped % self._probe_every
        return int(skipped == self._probe_every)

    def record(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """Fade what is known and add this step. Drafts behind the first rejected were not tried."""
        if not num_drafted:
            return
        tried = min(num_drafted, num_accepted + 1)
        accepted, count = self._counts.get(request_id, (0.0, 0.0))
        fade = self._memory
        self._counts[request_id] = (accepted * fade + num_accepted, count * fade + tried)
        self._all = (self._all[0] * fade + num_accepted, self._all[1] * fade + tried)

    def forget(self, request_id: str) -> None:
        """Drop its counts."""
        self._counts.pop(request_id, None)
        self._skipped.pop(request_id, None)
