"""The coordinator: places requests on pairs of ranks, and answers each exactly once.

A request is placed as an *attempt*: one prefill rank, one decode rank. An answer counts only while
its attempt is open. An attempt is closed when a rank that it needs dies, falls silent or reports
that the handover is lost; its request is then placed anew, as long as attempts and time are left.
Otherwise it ends with an error. (The routers are those of the replicas: serving.router.)
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.errors import ReplicaError
from ch15_helpers.serving.channel import Message
from ch15_helpers.serving.replica_launch import Link
from ch15_helpers.serving.request import SamplingParams
from ch15_helpers.serving.router import Attempt, Router
from ch15_helpers.serving.routing import RoutedRequest


@dataclass(eq=False)
class Ticket:
    """One request, from its arrival to its one answer.

    Attributes:
        arrival_s: absolute. deadline_s: when it ends with an error.
        avoid: decode ranks to which its handover was lost.
        attempt: number of the open attempt; -1 is none.
        adopted: the decode rank has everything, so that the prefill rank is no longer needed.
        sender: what the prefill ranks noted, by attempt. done: the answer.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    arrival_s: float
    deadline_s: float
    prefill_rank: int = -1
    decode_rank: int = -1
    num_attempts: int = 0
    avoid: set[int] = field(default_factory=set)
    attempt: int = -1
    adopted: bool = False
    first_s: float | None = None
    last_reason: str = ""
    sender: dict[int, Message] = field(default_factory=dict)
    done: Message | None = None
    done_attempt: int = -1


class Coordinator:
    """Hears the ranks and places requests. One thread.

    Attributes:
        links: the ranks, in order. num_late: answers to closed attempts, which were dropped.
        num_replaced: placements beyond each request's first.
    """

    def __init__(self, links: Sequence[Link], spec: DisaggSpec) -> None:
        self.links, self.spec = list(links), spec
        self.num_late = self.num_replaced = 0
        self._routers = [
            Router(spec.num_prefill, spec.policy),
            Router(spec.num_decode, spec.policy),
        ]
        self._placed: dict[int, tuple[Attempt, Attempt, Ticket]] = {}
        self._of_number: dict[int, Ticket] = {}  # attempts that were open once
        self._num_attempts = 0
        self._ended: deque[Ticket] = deque()
        self._open: dict[int, Ticket] = {}
        self.replies: list[tuple[int, Message]] = []  # to questions, not about requests

    @property
    def num_open(self) -> int:
        """Requests without an answer."""
        return len(self._open)

    @property
    def num_started(self) -> int:
        """Open requests that have their first token."""
        return sum(ticket.first_s is not None for ticket in self._open.values())

    @property
    def num_decoding(self) -> int:
        """Open requests whose decode rank has everything."""
        return sum(ticket.adopted for ticket in self._open.values())

    def is_alive(self, rank: int) -> bool:
        """Whether a rank is connected and not silent."""
        router, index = self._side(rank)
        return router.loads.alive[index]

    def submit(self, ticket: Ticket) -> None:
        """Place a request for the first time."""
        self._open[ticket.number] = ticket
        self._place(ticket)

    def abandon(self) -> None:
        """Nobody waits for the open requests any more; forget them and all that have ended."""
        for ticket in self._open.values():
            self._close(ticket)
        self._open.clear()
        self._ended.clear()
        self._of_number.clear()

    def poll(self, timeout_s: float) -> list[Ticket]:
        """Hear the ranks, move what was lost; returns the requests that ended."""
        listening = [link for link in self.links if link.gone is None]
        connected = [link.channel for link in listening if not link.channel.closed]
        if connected:
            at_once = self._ended or len(connected) < len(listening)
            select.select(connected, [], [], 0.0 if at_once else timeout_s)
        for link in listening:
            self._hear(link)
        now_s = time.monotonic()
        for link in listening:
            silent_s = now_s - link.heard_s
            if link.gone is None and silent_s > self.spec.silence_s and self.is_alive(link.rank):
                self._dead(link, f"silent for {silent_s:.1f} s")
        for ticket in [t for t in self._open.values() if t.deadline_s <= now_s]:
            self._close(ticket)
            limit_s = self.spec.request_timeout_s
            self._fail(ticket, f"it took longer than {limit_s:g} s{_because(ticket)}")
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def broadcast(self, message: Message) -> None:
        """Tell all ranks."""
        for link in self.links:
            link.channel.send(message)

    def ask(self, message: Message, reply: str, timeout_s: float = 30.0) -> dict[int, Message]:
        """Tell all ranks, and wait for the reply of each that lives, by rank.

        Raises:
            ReplicaError: a rank neither answers nor dies.
        """
        self.replies.clear()
        self.broadcast(message)
        deadline_s = time.monotonic() + timeout_s
        while True:
            answers = {rank: each for rank, each in self.replies if each["op"] == reply}
            alive = [k.rank for k in self.links if self.is_alive(k.rank)]
            missing = [rank for rank in alive if rank not in answers]
            if not missing:
                return answers
            if time.monotonic() > deadline_s:
                raise ReplicaError(f"ranks {missing} did not answer {message['op']!r} in time")
            self._ended.extend(self.poll(0.05))

    def check_invariants(self) -> None:
        """Raise AssertionError when routers and requests disagree."""
        for router in self._routers:
            router.check_invariants()
        assert {t.attempt for t in self._open.values()} == set(self._placed), "an attempt is lost"

    # ---- placing -----------------------------------------------------------------------------

    def _place(self, ticket: Ticket) -> None:
        if ticket.num_attempts >= self.spec.max_attempts:
            self._fail(ticket, f"{ticket.num_attempts} attempts failed{_because(ticket)}")
            return
        name, length = str(ticket.number), len(ticket.prompt)
        prefill, decode = self._routers
        if not prefill.loads.living or not decode.loads.living:
            self._fail(ticket, self._nobody())
            return
        with _avoiding(decode, {rank - self.spec.num_prefill for rank in ticket.avoid}):
            target = decode.route(RoutedRequest(name, length, ticket.params.max_tokens))
        source = prefill.route(RoutedRequest(name, length, 0))
        ticket.attempt = self._num_attempts
        self._num_attempts += 1
        self._placed[ticket.attempt] = (source, target, ticket)
        self._of_number[ticket.attempt] = ticket
        self.num_replaced += ticket.num_attempts > 0
        ticket.num_attempts += 1
        ticket.adopted, ticket.first_s = False, None
        ticket.prefill_rank = source.replica
        ticket.decode_rank = self.spec.num_prefill + target.replica
        self.links[ticket.prefill_rank].channel.send(
            {
                "op": "prefill",
                "attempt": ticket.attempt,
                "prompt": ticket.prompt,
                "params": asdict(ticket.params),
                "target": ticket.decode_rank,
                "arrival_s": ticket.arrival_s,
            }
        )

    def _nobody(self) -> str:
        fates = "; ".join(
            f"{self.spec.role(k.rank)} rank {k.rank}: {k.gone or 'silent'}"
            for k in self.links
            if not self.is_alive(k.rank)
        )
        return f"one side has no rank left ({fates}); launch the cluster again"

    def _close(self, ticket: Ticket) -> None:
        """Close the open attempt; both ranks forget it."""
        placed = self._placed.pop(ticket.attempt, None)
        if placed is None:
            return
        for router, attempt in zip(self._routers, placed[:2], strict=True):
            router.cancel(attempt.attempt_id)
        for rank in (ticket.prefill_rank, ticket.decode_rank):
            self.links[rank].channel.send({"op": "cancel", "attempts": [ticket.attempt]})
        ticket.attempt = -1

    def _fail(self, ticket: Ticket, reason: str) -> None:
        error = f"request {ticket.number} was not answered: {reason}"
        ticket.done = {"token_ids": [], "times_s": [], "finish_reason": "error", "error": error}
        ticket.prefill_rank = ticket.decode_rank = -1
        self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        del self._open[ticket.number]
        self._ended.append(ticket)

    # ---- hearing -----------------------------------------------------------------------------

    def _hear(self, link: Link) -> None:
        try:
            messages = link.channel.receive()
        except ReplicaError as error:
            link.channel.close()
            link.gone = str(error)
            self._dead(link, link.gone)
            return
        for message in messages:
            link.heard_s = time.monotonic()
            router, index = self._side(link.rank)
            if not router.loads.alive[index]:
                router.mark_alive(index)  # it was only silent
            self._handle(link, message)
        if link.channel.closed and link.gone is None:
            link.gone = "its process ended"
            self._dead(link, link.gone)

    def _handle(self, link: Link, message: Message) -> None:
        operation = message["op"]
        if "attempt" not in message:
            if operation != "beat":
                self.replies.append((link.rank, message))
            return
        number = message["attempt"]
        if operation == "handed":
            if (late := self._of_number.get(number)) is not None:
                late.sender[number] = message
            return
        placed = self._placed.get(number)
        if placed is None:
            self.num_late += operation == "done"
            return
        ticket = placed[2]
        if operation == "first":
            ticket.first_s = message["at_s"]
            self._routers[0].complete(placed[0].attempt_id)
        elif operation == "adopted":
            ticket.adopted = True
        elif operation == "lost":
            ticket.avoid.add(ticket.decode_rank)
            self._again(ticket, f"rank {link.rank}: {message['reason']}")
        elif operation == "done":
            del self._placed[number]
            for router, attempt in zip(self._routers, placed[:2], strict=True):
                router.complete(attempt.attempt_id)
            ticket.done, ticket.done_attempt, ticket.attempt = message, number, -1
            self._end(ticket)

    def _again(self, ticket: Ticket, reason: str) -> None:
        ticket.last_reason = reason
        self._close(ticket)
        self._place(ticket)

    def _dead(self, link: Link, reason: str) -> None:
        """A rank is dead: whoever needs it starts anew, elsewhere."""
        router, index = self._side(link.rank)
        role = self.spec.role(link.rank)
        needing = [
            ticket
            for *_, ticket in self._placed.values()
            if ticket.decode_rank == link.rank
            or (ticket.prefill_rank == link.rank and not ticket.adopted)
        ]
        for ticket in needing:
            ticket.last_reason = f"{role} rank {link.rank}: {reason}"
            self._close(ticket)
        router.mark_dead(index)
        for ticket in needing:
            self._place(ticket)

    def _side(self, rank: int) -> tuple[Router, int]:
        if rank < self.spec.num_prefill:
            return self._routers[0], rank
        return self._routers[1], rank - self.spec.num_prefill


def _because(ticket: Ticket) -> str:
    return f"; the last attempt: {ticket.last_reason}" if ticket.last_reason else ""


@contextmanager
def _avoiding(router: Router, indices: set[int]) -> Iterator[None]:
    """Do not choose these while there are others."""
    loads = router.loads
    shunned = [index for index in loads.living if index in indices]
    if len(shunned) == len(loads.living):
        shunned = []
    for index in shunned:
        loads.set_alive(index, False)
    try:
        yield
    finally:
        for index in shunned:
            loads.set_alive(index, True)
