"""Prefill and decode pools in real processes, for notebooks, tests and the command line.

``with DisaggCluster.launch(spec) as cluster: run = cluster.run(prompts, params)`` starts the ranks
once and serves any number of workloads. The caller is the coordinator; however it ends, the ranks
end with it. (DistServe, Zhong et al., OSDI 2024; Splitwise, Patel et al., ISCA 2024.)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ch15_helpers.disagg.coordinator import Coordinator, Ticket
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.rank_wire import WIRE_FAULTS
from ch15_helpers.disagg.results import (
    DisaggOutput,
    DisaggRun,
    RankStats,
    handover_times,
    metrics_of,
)
from ch15_helpers.disagg.spec import DisaggSpec, resolve_network
from ch15_helpers.errors import InvalidRequestError, TransportError
from ch15_helpers.serving.intake import params_for
from ch15_helpers.serving.replica_launch import Launched, Link
from ch15_helpers.serving.request import SamplingParams
from ch15_helpers.serving.runs import duration_from
from ch15_helpers.serving.sampling import derive_seed
from ch15_helpers.serving.workload import Workload

_SETTLE_S = 2.0  # for what ranks still have to say when all requests have ended
_DRAIN_S = 5.0


class DisaggCluster:
    """Ranks that are ready. Use it in a ``with``, or ``close`` it.

    Attributes:
        spec: what runs. links: the ranks: ``rank``, ``pid``, ``device``, ``num_blocks``.
    """

    def __init__(
        self, links: Sequence[Link], spec: DisaggSpec, token: str, launched: Launched | None = None
    ) -> None:
        """Take over ranks that are ready; see ``launch`` for starting them.

        Args:
            token: with which prefill ranks introduce themselves to decode ranks.
        """
        self.spec = spec
        self._launched = launched
        self._coordinator = Coordinator(links, spec)
        self.links = self._coordinator.links
        addresses = {str(link.rank): link.address for link in self.links if link.address}
        for link in self.links[: spec.num_prefill]:
            link.channel.send({"op": "peers", "addresses": addresses, "token": token})

    @classmethod
    def launch(
        cls, spec: DisaggSpec, *, timeout_s: float = 120.0, threads: int | None = None
    ) -> DisaggCluster:
        """Start the processes on this machine, and wait until all are ready.

        Args:
            threads: of each rank on a CPU; None divides the cores among them.

        Raises:
            ReplicaError: a rank could not start (with its reason), or not in time.
            TransportError: the medium needs another launcher (``mpi``: mpirun).
        """
        from ch15_helpers.disagg.launch import launch_cluster

        return launch_cluster(spec, timeout_s=timeout_s, threads=threads)

    def __enter__(self) -> DisaggCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the ranks; their processes are gone afterwards, if we started them."""
        if self._launched is not None:
            self._launched.close()
            return
        self._coordinator.broadcast({"op": "stop"})
        for link in self.links:
            link.channel.close()

    # ---- serving -----------------------------------------------------------------------------

    def run(
        self,
        prompts: Sequence[Sequence[int]] | Workload,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        overlap: bool = True,
        network: str | LinkModel | None = None,
        arrivals_s: Sequence[float] | None = None,
        max_open: int | None = None,
        draft_length: int | None = None,
        on_poll: Callable[[DisaggCluster], None] | None = None,
    ) -> DisaggRun:
        """Serve a list of requests; all of them end, well or with an error.

        Args:
            prompts: token ids; or a workload, which brings parameters and arrivals.
            params: for all, or one for each.
            overlap: send parts while the prefill runs; False sends all bytes after it.
            network: a link to simulate around the real medium, by name or as a model.
            arrivals_s: when each arrives, from the start, ascending; None is all at once.
            max_open: a closed loop: so many are open at once.
            draft_length: tokens to draft in this run, where the spec has speculation; 0 is none,
                None is the spec's.
            on_poll: called again and again while requests are open, e.g. to break something.

        Raises:
            InvalidRequestError: prompts, parameters and arrivals do not fit together.
            TransportError: there is no such link.
        """
        link = resolve_network(network)
        vocab_size = self._configure(overlap, link, draft_length)
        if isinstance(prompts, Workload):
            workload = prompts
            prompts = [workload.prompt(index, vocab_size) for index in range(len(workload))]
            params = [request.params for request in workload]
            arrivals_s = [request.arrival_s for request in workload]
        each = params_for(len(prompts), params)
        if arrivals_s is not None and len(arrivals_s) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts came with {len(arrivals_s)} arrivals"
            )
        limit = max_open or len(prompts)
        tickets, start_s = self._serve(prompts, each, arrivals_s, limit, on_poll)
        self._settle(tickets)
        outputs = [self._output(ticket) for ticket in tickets]
        arrivals = [ticket.arrival_s - start_s for ticket in tickets]
        coordinator = self._coordinator
        return DisaggRun(
            outputs=outputs,
            arrivals_s=arrivals,
            ranks=self.stats(),
            duration_s=duration_from(outputs, arrivals),
            overlap=overlap,
            network=link,
            num_replaced=coordinator.num_replaced - self._before[0],
            num_late=coordinator.num_late - self._before[1],
        )

    def _configure(self, overlap: bool, link: LinkModel | None, draft_length: int | None) -> int:
        """Begin a run on all ranks; returns the size of the model's vocabulary."""
        if draft_length and self.spec.speculate is None:
            raise InvalidRequestError(
                "draft_length is for a spec with speculate='ngram' or another"
            )
        coordinator = self._coordinator
        coordinator.abandon()  # what an interrupted run has left
        length = self.spec.draft_length if draft_length is None else draft_length
        message = {
            "overlap": overlap,
            "network": None if link is None else asdict(link),
            "draft_length": length,
        }
        answers = coordinator.ask({"op": "configure", **message}, "configured")
        self._before = coordinator.num_replaced, coordinator.num_late
        return max((answer["vocab_size"] for answer in answers.values()), default=0)

    def _serve(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        arrivals_s: Sequence[float] | None,
        max_open: int,
        on_poll: Callable[[DisaggCluster], None] | None,
    ) -> tuple[list[Ticket], float]:
        start_s, tickets, num_ended = time.monotonic(), list[Ticket](), 0
        seed = self.spec.engine_config("decode").seed
        while num_ended < len(prompts):
            now_s, wait_s = time.monotonic(), 0.1
            while len(tickets) < len(prompts) and len(tickets) - num_ended < max_open:
                number = len(tickets)
                due_s = now_s if arrivals_s is None else start_s + arrivals_s[number]
                if due_s > now_s:
                    wait_s = min(wait_s, due_s - now_s)
                    break
                one = params[number]
                if one.seed is None:
                    values = asdict(one) | {"seed": derive_seed(seed, number)}
                    one = SamplingParams(**values)
                limit_s = due_s + self.spec.request_timeout_s
                tickets.append(Ticket(number, list(prompts[number]), one, due_s, limit_s))
                self._coordinator.submit(tickets[-1])
            num_ended += len(self._coordinator.poll(wait_s))
            if on_poll is not None:
                on_poll(self)
        return tickets, start_s

    def _settle(self, tickets: Sequence[Ticket]) -> None:
        """Wait for what the prefill ranks noted; it may come after the answer."""
        deadline_s = time.monotonic() + _SETTLE_S
        late = [t for t in tickets if t.done and "notes" in t.done]
        while time.monotonic() < deadline_s:
            late = [t for t in late if t.done_attempt not in t.sender]
            if not any(self._coordinator.is_alive(t.prefill_rank) for t in late):
                return
            self._coordinator.poll(0.01)

    def _output(self, ticket: Ticket) -> DisaggOutput:
        done = ticket.done
        assert done is not None, "every ticket ends"
        sender, notes = ticket.sender.get(ticket.done_attempt), done.get("notes")
        started_s = None if sender is None else sender["began_s"]
        times_s = done["times_s"]
        return DisaggOutput(
            request_id=str(ticket.number),
            prompt_token_ids=ticket.prompt,
            token_ids=done["token_ids"],
            text="",
            finish_reason=done["finish_reason"],
            error=done["error"],
            metrics=metrics_of(times_s, ticket.arrival_s, started_s, done.get("preemptions", 0)),
            prefill_rank=ticket.prefill_rank,
            decode_rank=ticket.decode_rank if notes else -1,
            num_attempts=ticket.num_attempts,
            handover=handover_times(sender, notes) if sender and notes else None,
        )

    def log_tail(self) -> str:
        """The end of what the ranks wrote to their outputs, if we started them."""
        return "" if self._launched is None else self._launched.log_tail()

    # ---- looking and breaking ----------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Requests without an answer."""
        return self._coordinator.num_open

    @property
    def num_started(self) -> int:
        """Of those, requests that have their first token."""
        return self._coordinator.num_started

    @property
    def num_decoding(self) -> int:
        """Of those, requests whose blocks have all arrived."""
        return self._coordinator.num_decoding

    @property
    def alive(self) -> list[bool]:
        """Whether each rank is connected and heard of."""
        return [self._coordinator.is_alive(link.rank) for link in self.links]

    def stats(self) -> list[RankStats]:
        """What each rank that lives has done since the last run began."""
        answers = self._coordinator.ask({"op": "stats"}, "stats")
        return [
            RankStats(**{name: value for name, value in answer.items() if name != "op"})
            for _, answer in sorted(answers.items())
        ]

    def check_drained(self) -> None:
        """Raise AssertionError unless all pools become empty within some seconds."""
        deadline_s = time.monotonic() + _DRAIN_S
        while used := {each.rank: each.used_blocks for each in self.stats() if each.used_blocks}:
            assert time.monotonic() < deadline_s, f"blocks are still in use, by rank: {used}"
        self._coordinator.check_invariants()

    def kill(self, rank: int) -> None:
        """End a rank's process without warning (SIGKILL), as an accident would."""
        os.kill(self.links[rank].pid, signal.SIGKILL)

    def fault(self, rank: int, fault: str, count: int = 1) -> None:
        """Have the wire of a rank fail for its next ``count`` messages; see ``WireFault``."""
        if fault not in WIRE_FAULTS:
            raise TransportError(f"there is no fault {fault!r}; choose from {WIRE_FAULTS}")
        self.links[rank].channel.send({"op": "fault", "fault": fault, "count": count})

    def mend(self, rank: int) -> None:
        """No more faults in the wire of a rank; what was stalled goes on, late."""
        self.links[rank].channel.send({"op": "mend"})

    def damage(self, rank: int) -> None:
        """Scramble a rank's whole pool: a same-tokens check that passes then is none."""
        self.links[rank].channel.send({"op": "damage"})
