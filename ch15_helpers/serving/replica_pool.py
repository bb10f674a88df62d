"""Real replicas behind the router: each request is answered once, also when replicas die.

The pool is the router's side of ``replica_worker``. A replica is dead when its connection closes
(its process ended) or when it has been silent for longer than ``deadline_s`` (it hangs). Its open
requests then go elsewhere as new attempts. A replica that was only slow may still answer; the
answer's attempt is closed, so it is dropped, and the replica may have work again.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict

from ch15_helpers.errors import NoReplicaError, ReplicaError
from ch15_helpers.serving.channel import Message
from ch15_helpers.serving.prefix_index import token_keys
from ch15_helpers.serving.replica_launch import Launched, Link, launch_replicas
from ch15_helpers.serving.replica_spec import ReplicaOutput, ReplicaSpec, ReplicaTotals
from ch15_helpers.serving.request import SamplingParams
from ch15_helpers.serving.router import Router
from ch15_helpers.serving.routing import KVAware, RoutedRequest, RoutingPolicy
from ch15_helpers.serving.sampling import derive_seed


class ReplicaPool:
    """Replicas that take requests. Use it in a ``with``, or ``close`` it.

    Attributes:
        links: the replicas, by rank. totals: their counts.
        num_late_answers: answers that came after their attempt was closed, and were dropped.
    """

    def __init__(
        self,
        links: Sequence[Link],
        spec: ReplicaSpec,
        policy: str | RoutingPolicy = "kv_aware",
        *,
        deadline_s: float = 30.0,
        max_attempts: int = 3,
        launched: Launched | None = None,
    ) -> None:
        """Take over replicas that are ready; see ``launch`` for starting them.

        Args:
            policy: see ``reset``.
            deadline_s: silence after which a replica counts as dead. It must be longer than the
                longest step, as a replica cannot give a sign of life within one.
            max_attempts: placements of one request before it is given up: a request that kills
                whoever computes it must not take down all.
        """
        self.links = list(links)
        self.spec = spec
        self.deadline_s, self.max_attempts = deadline_s, max_attempts
        self.totals = [ReplicaTotals() for _ in links]
        self.num_late_answers = 0
        self._launched = launched
        self._num_requests = 0
        self._open: dict[int, ReplicaOutput] = {}  # by attempt
        self._taken: list[list[int]] = [[] for _ in links]  # attempts that a replica may still have
        self._ended: deque[ReplicaOutput] = deque()
        self._router = self._new_router(policy, first_attempt_id=0)

    @classmethod
    def launch(
        cls,
        spec: ReplicaSpec,
        num_replicas: int,
        policy: str | RoutingPolicy = "kv_aware",
        *,
        deadline_s: float = 30.0,
        max_attempts: int = 3,
        timeout_s: float = 120.0,
    ) -> ReplicaPool:
        """Start the processes and wait until all are ready; see ``launch_replicas``."""
        launched = launch_replicas(spec, num_replicas, timeout_s=timeout_s)
        return cls(
            launched.links,
            spec,
            policy,
            deadline_s=deadline_s,
            max_attempts=max_attempts,
            launched=launched,
        )

    def __enter__(self) -> ReplicaPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, policy: str | RoutingPolicy) -> None:
        """Empty caches and a new router, between runs.

        Args:
            policy: a name, or a policy for this many replicas. ``kv_aware`` by name takes block
                size and capacity from the replicas' own caches.

        Raises:
            ReplicaError: requests are open.
        """
        if self._open:
            raise ReplicaError(f"{len(self._open)} requests are open; reset without")
        self._router = self._new_router(policy, self._router.num_attempts)
        self._broadcast({"op": "reset"})

    @property
    def router(self) -> Router:
        """Who places the requests."""
        return self._router

    @property
    def num_open(self) -> int:
        """Requests without an answer."""
        return len(self._open) + len(self._ended)

    def num_started(self, replica: int | None = None) -> int:
        """Open requests that have their first token; of one replica, or of all."""
        started = [each for each in self._open.values() if each.ttft_s is not None]
        return sum(replica in (None, each.replica) for each in started)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        session: int | None = None,
    ) -> int:
        """Place a request; returns its number. With no replica left its answer is an error.

        A request without a seed gets one from its number, so that it has the same tokens on
        whichever replica, at whichever attempt.
        """
        number = self._num_requests
        self._num_requests += 1
        params = params or SamplingParams()
        if params.seed is None:
            seed = derive_seed(self.spec.engine_config().seed, number)
            params = SamplingParams(**{**asdict(params), "seed": seed})
        now_s = time.monotonic()
        self._place(ReplicaOutput(number, list(prompt), params, session, now_s))
        return number

    def poll(self, timeout_s: float = 0.0) -> list[ReplicaOutput]:
        """Hear the replicas, move what the dead have left; returns the requests that ended.

        Args:
            timeout_s: how long to wait for a message, when nothing has ended.
        """
        listening = [link for link in self.links if link.gone is None]
        connected = [link.channel for link in listening if not link.channel.closed]
        if connected:
            # A send may have found a connection closed: then there is something to do at once.
            at_once = self._ended or len(connected) < len(listening)
            wait_s = 0.0 if at_once else min(timeout_s, self.deadline_s / 4)
            select.select(connected, [], [], wait_s)
        for link in listening:
            self._hear(link)
        now_s = time.monotonic()
        for link in listening:
            silent_s = now_s - link.heard_s
            if link.gone is None and silent_s > self.deadline_s:
                self._lose(link, f"silent for {silent_s:.1f} s")
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sessions: Sequence[int] | None = None,
        max_open: int | None = None,
    ) -> list[ReplicaOutput]:
        """Serve a list of prompts; returns the answers in its order.

        Args:
            params: for all, or one for each.
            sessions: conversation of each prompt.
            max_open: a closed loop: so many are open at once, the next goes out when one ends.
        """
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        limit = len(prompts) if max_open is None else max_open
        if limit < 1 <= len(prompts):
            raise ReplicaError(f"max_open is {max_open}; at least one request must be open")
        first, answers = self._num_requests, dict[int, ReplicaOutput]()
        sent = 0
        while len(answers) < len(prompts):
            while sent < len(prompts) and sent - len(answers) < limit:
                session = None if sessions is None else sessions[sent]
                self.submit(prompts[sent], each[sent], session)
                sent += 1
            for output in self.poll(timeout_s=1.0):
                answers[output.request_id] = output
        return [answers[first + index] for index in range(len(prompts))]

    def damage(self, replica: int) -> None:
        """Scramble a replica's whole KV cache: a same-tokens check that passes then is none."""
        self.links[replica].channel.send({"op": "damage"})

    def kill(self, replica: int) -> None:
        """End a replica's process without warning (SIGKILL), as an accident would."""
        os.kill(self.links[replica].pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop the replicas; their processes are gone afterwards."""
        if self._launched is not None:
            self._launched.close()
            return
        self._broadcast({"op": "stop"})
        for link in self.links:
            link.channel.close()

    # ---- inside ------------------------------------------------------------------------------

    def _new_router(self, policy: str | RoutingPolicy, first_attempt_id: int) -> Router:
        self._key_block = self.spec.engine_config().block_size
        if policy == "kv_aware":
            blocks = max(1, *(link.num_blocks for link in self.links))
            policy = KVAware(len(self.links), block_size=self._key_block, capacity_blocks=blocks)
        elif isinstance(policy, KVAware):
            self._key_block = policy.block_size
        # Numbers go on, so that a late answer from before never fits an attempt of now.
        router = Router(len(self.links), policy, first_attempt_id=first_attempt_id)
        for link in self.links:
            if link.gone is not None:
                router.mark_dead(link.rank)
        return router

    def _place(self, output: ReplicaOutput) -> None:
        routed = RoutedRequest(
            request_id=str(output.request_id),
            num_prompt_tokens=len(output.prompt),
            num_output_tokens=output.params.max_tokens,
            keys=token_keys(output.prompt, self._key_block),
            session=output.session,
        )
        if output.num_attempts >= self.max_attempts:
            self._give_up(output, f"its replica died {output.num_attempts} times in a row")
            return
        try:
            attempt = self._router.route(routed)
        except NoReplicaError:
            fates = "; ".join(f"replica {k.rank}: {k.gone or 'silent'}" for k in self.links)
            self._give_up(output, f"no replica is alive ({fates}); start the pool again")
            return
        output.num_attempts += 1
        output.replica = attempt.replica
        self._open[attempt.attempt_id] = output
        self.links[attempt.replica].channel.send(
            {
                "op": "submit",
                "attempt": attempt.attempt_id,
                "prompt": output.prompt,
                "params": asdict(output.params),
            }
        )

    def _give_up(self, output: ReplicaOutput, reason: str) -> None:
        output.finish_reason = "error"
        output.error = f"request {output.request_id} was not answered: {reason}"
        output.token_ids, output.ttft_s, output.replica = [], None, -1
        self._ended.append(output)

    def _hear(self, link: Link) -> None:
        try:
            messages = link.channel.receive()
        except ReplicaError as error:
            link.channel.close()
            self._lose(link, str(error), for_good=True)
            return
        for message in messages:
            link.heard_s = time.monotonic()
            if not self._router.loads.alive[link.rank]:
                self._welcome_back(link)
            if message["op"] == "first":
                self._first(message)
            elif message["op"] == "done":
                self._done(link, message)
        if link.channel.closed:
            self._lose(link, "its process ended", for_good=True)

    def _first(self, message: Message) -> None:
        output = self._open.get(message["attempt"])
        if output is not None:
            output.ttft_s = time.monotonic() - output.submitted_s

    def _done(self, link: Link, message: Message) -> None:
        self.totals[link.rank] = ReplicaTotals(
            message["steps"], message["prompt_tokens"], message["busy_s"]
        )
        output = self._open.pop(message["attempt"], None)
        if self._router.complete(message["attempt"]) is None or output is None:
            self.num_late_answers += 1
            return
        output.token_ids, output.finish_reason = message["token_ids"], message["finish_reason"]
        output.error, output.num_cached_tokens = message["error"], message["cached"]
        output.e2e_s = time.monotonic() - output.submitted_s
        self._ended.append(output)

    def _lose(self, link: Link, reason: str, for_good: bool = False) -> None:
        """A replica is dead: its open requests go elsewhere."""
        if for_good:
            link.gone = reason
        orphans = self._router.mark_dead(link.rank)
        for attempt in orphans:
            self._taken[link.rank].append(attempt.attempt_id)
        moved = [self._open.pop(attempt.attempt_id) for attempt in orphans]
        for output in moved:
            output.ttft_s = None
            self._place(output)

    def _welcome_back(self, link: Link) -> None:
        """It was only silent: what was taken from it is no longer wanted, new work is."""
        link.channel.send({"op": "abort", "attempts": self._taken[link.rank]})
        self._taken[link.rank] = []
        self._router.mark_alive(link.rank)

    def _broadcast(self, message: Message) -> None:
        for link in self.links:
            link.channel.send(message)
