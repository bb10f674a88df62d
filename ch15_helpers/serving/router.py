"""A router over replicas: places requests, counts what is open, and survives a replica's death.

It is plain Python and knows no process and no tensor: simulated replicas (``cluster``) and real
ones (``replica_pool``) stand behind the same object. Each time a request is placed it gets a new
*attempt*. An answer counts only while its attempt is open, so a request that was moved because its
replica seemed dead is answered once, whichever of the two answers first.
"""

from __future__ import annotations

from dataclasses import dataclass

from ch15_helpers.errors import NoReplicaError
from ch15_helpers.serving.loads import Loads
from ch15_helpers.serving.routing import RoutedRequest, RoutingPolicy, make_routing_policy


@dataclass(frozen=True, slots=True)
class Attempt:
    """One placement of one request.

    Attributes:
        attempt_id: unique for the router.
        request: what was placed.
        replica: where.
        cost_tokens: added to the replica's load until the attempt is closed: prompt tokens that
            are not expected in its cache, and output tokens.
        matched_tokens: prompt tokens that are expected in its cache.
    """

    attempt_id: int
    request: RoutedRequest
    replica: int
    cost_tokens: int
    matched_tokens: int


class Router:
    """Places requests on replicas ``0 .. num_replicas - 1``; all are alive at first.

    Attributes:
        policy: who decides.
        loads: outstanding tokens and who is alive, as the router sees it.
        num_completed, num_late: answers that counted, and answers to closed attempts.
        num_attempts: number of the next attempt; a router that follows this one starts there.
    """

    def __init__(
        self,
        num_replicas: int,
        policy: str | RoutingPolicy = "round_robin",
        *,
        seed: int = 0,
        first_attempt_id: int = 0,
    ) -> None:
        """Start with nothing placed.

        Args:
            policy: a name of ROUTING_POLICIES, or a policy.
            seed: of the random choices of ``power_of_two``.
            first_attempt_id: number of the first attempt; see ``num_attempts``.

        Raises:
            ValueError: no replicas, or a policy that does not exist.
        """
        self.loads = Loads(num_replicas)
        if isinstance(policy, str):
            policy = make_routing_policy(policy, num_replicas, seed)
        self.policy = policy
        self.num_completed = self.num_late = 0
        self._open: dict[int, Attempt] = {}
        self._of_replica: list[dict[int, Attempt]] = [{} for _ in range(num_replicas)]
        self.num_attempts = first_attempt_id

    @property
    def num_replicas(self) -> int:
        """All of them, dead or alive."""
        return len(self.loads)

    @property
    def num_open(self) -> int:
        """Attempts without an answer."""
        return len(self._open)

    def route(self, request: RoutedRequest) -> Attempt:
        """Choose a replica, and count the request as open there.

        Raises:
            NoReplicaError: all replicas are dead.
        """
        if not self.loads.living:
            raise NoReplicaError(
                f"request {request.request_id!r} cannot be placed: all {self.num_replicas} "
                "replicas are dead; restart one and call mark_alive"
            )
        replica, matched = self.policy.choose(request, self.loads)
        cost = request.num_prompt_tokens - matched + request.num_output_tokens
        attempt = Attempt(self.num_attempts, request, replica, cost, matched)
        self.num_attempts += 1
        self._open[attempt.attempt_id] = self._of_replica[replica][attempt.attempt_id] = attempt
        self.loads.add(replica, cost)
        self.policy.sent(request, replica)
        return attempt

    def complete(self, attempt_id: int) -> Attempt | None:
        """An answer came. None says that its attempt is closed, so that it must be dropped."""
        attempt = self._close(attempt_id)
        if attempt is None:
            self.num_late += 1
        else:
            self.num_completed += 1
        return attempt

    def cancel(self, attempt_id: int) -> Attempt | None:
        """Nobody wants the answer any more; None when the attempt is closed already."""
        return self._close(attempt_id)

    def is_open(self, attempt_id: int) -> bool:
        """Whether an answer to this attempt would count."""
        return attempt_id in self._open

    def mark_dead(self, replica: int) -> list[Attempt]:
        """Send nothing more there, and close its attempts.

        Returns:
            The closed attempts in the order of their placement; route their requests again.
        """
        orphans = list(self._of_replica[self._known(replica)].values())
        for attempt in orphans:
            self._close(attempt.attempt_id)
        if self.loads.alive[replica]:
            self.loads.set_alive(replica, False)
            self.policy.lost(replica)
        return orphans

    def mark_alive(self, replica: int) -> None:
        """A replica may get work again; its cache counts as empty."""
        self.loads.set_alive(self._known(replica), True)

    def check_invariants(self) -> None:
        """Raise AssertionError when loads, attempts and the living disagree."""
        self.loads.check_invariants()
        placed = {i: a for attempts in self._of_replica for i, a in attempts.items()}
        assert placed == self._open, "an attempt is lost"
        for replica, attempts in enumerate(self._of_replica):
            load = sum(attempt.cost_tokens for attempt in attempts.values())
            assert load == self.loads.outstanding[replica], f"load of replica {replica} is off"
            assert self.loads.alive[replica] or not attempts, f"dead replica {replica} has work"

    def _known(self, replica: int) -> int:
        if not 0 <= replica < self.num_replicas:
            raise ValueError(f"there is no replica {replica}; they are 0..{self.num_replicas - 1}")
        return replica

    def _close(self, attempt_id: int) -> Attempt | None:
        attempt = self._open.pop(attempt_id, None)
        if attempt is not None:
            del self._of_replica[attempt.replica][attempt_id]
            self.loads.remove(attempt.replica, attempt.cost_tokens)
        return attempt
