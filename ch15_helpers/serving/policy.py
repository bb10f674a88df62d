"""Who is admitted next and who is preempted: the two choices that the scheduler leaves open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ch15_helpers.serving.request import Request


class Policy(Protocol):
    """Queueing policy. Stateless between steps, so that one object may serve many schedulers."""

    @property
    def name(self) -> str:
        """Name as in SchedulerConfig.policy."""

    def next_index(self, waiting: Sequence[Request], num_running: int, now_s: float) -> int:
        """Index in the (non-empty) queue of the request to admit next, or -1 for nobody now.

        The scheduler stops admitting when that request does not fit: nobody overtakes it.
        """

    def victim(self, running: Iterable[Request]) -> Request:
        """Which of the (non-empty) running requests gives up its KV blocks."""


class FCFS:
    """First come, first served; the latest arrival is preempted first (Orca, vLLM).

    The queue is kept in order of arrival: preempted requests return to its front. As the oldest
    running request is never the victim while another runs, it always advances.
    """

    name = "fcfs"

    def next_index(self, waiting: Sequence[Request], num_running: int, now_s: float) -> int:
        """The head of the queue."""
        return 0

    def victim(self, running: Iterable[Request]) -> Request:
        """The latest arrival."""
        return max(running, key=_ordinal)


def _ordinal(request: Request) -> int:
    return request.ordinal


def make_policy(name: str) -> Policy:
    """The policy of that name. Raises ValueError with the valid names."""
    policies = {policy.name: policy for policy in (FCFS(),)}
    if name not in policies:
        raise ValueError(f"policy is {name!r}; it must be one of {', '.join(sorted(policies))}")
    return policies[name]
