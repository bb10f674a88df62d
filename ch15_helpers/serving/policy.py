"""Scheduling policies: the choices that the scheduler leaves open, each a few lines.

All run on one ``Scheduler``. None starves a request. Say that a policy has *lead* W for a request
r; then no request that arrives more than W after r is admitted before it, so r waits only for
requests that arrived in a bounded time. W is 0 for ``fcfs``, ``static`` and ``prefill_first``,
``ageing_s`` times the difference in priority for ``priority``, and r's TTFT limit plus
``max_overdue_s`` for ``least_slack``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from ch15_helpers.serving.request import SLO, Request

_rank = attrgetter("rank")


_SERVER_SLO = SLO(ttft_s=2.0, tpot_s=0.2)  # MLPerf's for Llama-2-70B


class Policy(Protocol):
    """Scheduling policy. Stateless, so that one object may serve many schedulers.

    Properties (plain attributes will do):
        name: as in SchedulerConfig.policy.
        joins_running: False admits only into an empty engine, and then all that fit at once.
        max_prefill_steps: 0 lets prompts and decodes share steps. Otherwise a step that has
            prompts computes nothing else; after this many in a row the decodes get a step.
        timeless: ``next_index`` does not depend on ``now_s``.
    """

    @property
    def name(self) -> str: ...

    @property
    def joins_running(self) -> bool: ...

    @property
    def max_prefill_steps(self) -> int: ...

    @property
    def timeless(self) -> bool: ...

    def rank(self, request: Request) -> float:
        """Place in the queue, smaller first; it is asked for when the request joins the queue.

        Requests of equal rank stand in order of arrival.
        """

    def next_index(self, waiting: Sequence[Request], num_running: int, now_s: float) -> int:
        """Index in the (non-empty) queue of the request to admit next, or -1 for nobody now.

        The scheduler stops admitting when that request does not fit: nobody overtakes it.
        """

    def urgency(self, request: Request, now_s: float) -> tuple[float, float]:
        """Order in which admitted prompts are computed, smaller first."""

    def prefill_budget(self, decoding: Sequence[Request], budget: int, now_s: float) -> int:
        """How many of ``budget`` tokens prompts may take beside the decodes of a step."""

    def victim(self, running: Iterable[Request]) -> Request:
        """Which of the (non-empty) running requests gives up its KV blocks."""


class FCFS:
    """First come, first served; the latest arrival is preempted first (Orca, vLLM).

    As the oldest running request is never the victim while another runs, it always advances.
    """

    name = "fcfs"
    joins_running = True
    max_prefill_steps = 0
    timeless = True

    def rank(self, request: Request) -> float:
        """Order of arrival; preempted requests thereby return to the front."""
        return float(request.ordinal)

    def next_index(self, waiting: Sequence[Request], num_running: int, now_s: float) -> int:
        """The head of the queue."""
        return 0

    def urgency(self, request: Request, now_s: float) -> tuple[float, float]:
        """Order of arrival."""
        return (request.rank, request.ordinal)

    def prefill_budget(self, decoding: Sequence[Request], budget: int, now_s: float) -> int:
        """All of it."""
        return budget

    def victim(self, running: Iterable[Request]) -> Request:
        """The latest arrival."""
        return max(running, key=_ordinal)


class Static(FCFS):
    """Request-level batching, the baseline of Orca: a batch runs until its last request ends.

    The batch is what has arrived when the engine falls idle, as far as slots and KV blocks go.
    It is a fair baseline: nothing is padded, and a finished request frees its slot in the
    computation at once; only joining is forbidden.
    """

    name = "static"
    joins_running = False


@dataclass(frozen=True)
class PrefillFirst(FCFS):
    """Prompts before decodes, never both in a step, as in vLLM's first scheduler (v0).

    Good for TTFT; each prompt step is a stall for everything that decodes. v0 had no bound on
    stalls; here decodes get a step after ``max_prefill_steps`` steps of prompts. Use it with
    ``enable_chunked_prefill=False`` for v0's whole prompts.
    """

    max_prefill_steps: int = 16
    name = "prefill_first"
    timeless = False

    def __post_init__(self) -> None:
        if self.max_prefill_steps < 1:
            raise ValueError(f"max_prefill_steps must be at least 1, got {self.max_prefill_steps}")


@dataclass(frozen=True)
class Priority(FCFS):
    """By ``Request.priority``, smaller first, with ageing.

    ``ageing_s`` seconds of waiting are worth one step of priority. As everybody ages alike, the
    order of two requests never changes: it is that of ``arrival_s + ageing_s * priority``.
    """

    ageing_s: float = 10.0
    name = "priority"

    def __post_init__(self) -> None:
        if not self.ageing_s > 0:
            raise ValueError(f"ageing_s must be positive, got {self.ageing_s}")

    def rank(self, request: Request) -> float:
        """Time of arrival, shifted by the priority."""
        return request.arrival_s + self.ageing_s * request.priority

    def victim(self, running: Iterable[Request]) -> Request:
        """The one that would be served last."""
        return max(running, key=lambda request: (request.rank, request.ordinal))


@dataclass(frozen=True)
class LeastSlack(FCFS):
    """Least slack first, against the TTFT and TPOT limits of each request.

    Slack is the time until a prompt must be started for its next token to be in time. The queue
    is ordered by that moment. A request whose moment has passed cannot be helped any more, while
    helping it makes the next ones late too (the overload behaviour of deadline scheduling); it
    stands back behind those that can still make it, for ``max_overdue_s`` at most.

    Between a prompt's tokens and the running decodes the same rule holds: a prompt chunk may take
    as long as the decodes are ahead of their pace, ``first token + n * tpot_s`` (Sarathi-Serve
    bounds the chunk for the same reason, but by one fixed budget).

    Attributes:
        default_slo: for requests that bring none; MLPerf's server limits for Llama-2-70B.
        max_overdue_s: how long after its moment a late request may be passed over.
        token_s: estimated time of one prompt token; ``StepTimeModel.estimates`` has it.
        step_s: estimated time of a step without prompts.
        min_chunk: prompt tokens that a step may always take, so that prompts advance.
    """

    default_slo: SLO = _SERVER_SLO
    max_overdue_s: float = 10.0
    token_s: float = 0.0
    step_s: float = 0.0
    min_chunk: int = 32
    name = "least_slack"
    timeless = False

    def __post_init__(self) -> None:
        for name in ("max_overdue_s", "token_s", "step_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.min_chunk < 1:
            raise ValueError(f"min_chunk must be at least 1, got {self.min_chunk}")

    def rank(self, request: Request) -> float:
        """When the rest of the prompt must be started; never before the arrival."""
        slo = request.slo or self.default_slo
        times = request.token_times_s
        due_s = times[0] + len(times) * slo.tpot_s if times else request.arrival_s + slo.ttft_s
        remaining = request.num_tokens - request.num_computed_tokens
        return max(request.arrival_s, due_s - self.step_s - self.token_s * remaining)

    def next_index(self, waiting: Sequence[Request], num_running: int, now_s: float) -> int:
        """Overdue for too long, else the least slack that is left, else the latest."""
        moment_s = waiting[0].rank
        if moment_s >= now_s or moment_s + self.max_overdue_s < now_s:
            return 0
        index = bisect_left(waiting, now_s, key=_rank)
        return index if index < len(waiting) else 0

    def urgency(self, request: Request, now_s: float) -> tuple[float, float]:
        """The same order over prompts under way, by what is left of them."""
        moment_s = self.rank(request)
        if moment_s + self.max_overdue_s < now_s:
            return (0.0, moment_s)
        return (1.0 if moment_s >= now_s else 2.0, moment_s)

    def prefill_budget(self, decoding: Sequence[Request], budget: int, now_s: float) -> int:
        """Tokens that fit into the smallest lead over its pace that a decode has.

        Decodes that are behind already do not count, or one of them would block all prompts.
        """
        if self.token_s <= 0:
            return budget
        begin_s = now_s + self.step_s
        due_s = no_hurry_s = begin_s + budget * self.token_s
        default_s = self.default_slo.tpot_s
        for request in decoding:  # the policy's one loop over all that runs: keep it short
            times, slo = request.token_times_s, request.slo
            mine_s = times[0] + len(times) * (default_s if slo is None else slo.tpot_s)
            if begin_s <= mine_s < due_s:
                due_s = mine_s
        if due_s == no_hurry_s:
            return budget
        return min(budget, max(self.min_chunk, int((due_s - begin_s) / self.token_s)))


def _ordinal(request: Request) -> int:
    return request.ordinal


def make_policy(policy: str | Policy) -> Policy:
    """The policy of that name, with its defaults; a Policy is returned as it is.

    Raises:
        ValueError: there is no such policy; the message lists the valid names.
    """
    if not isinstance(policy, str):
        return policy
    known: tuple[Policy, ...] = (FCFS(), Static(), PrefillFirst(), Priority(), LeastSlack())
    policies = {each.name: each for each in known}
    if policy not in policies:
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(sorted(policies))}")
    return policies[policy]
