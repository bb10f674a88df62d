"""A decode rank: reserves blocks, receives parts into them, and decodes what is complete.

A reservation is a lease: it ends when nothing is heard of its handover for too long, and then its
blocks go to others. Blocks that arrive damaged are computed again here; a handover whose sender or
link is gone is reported to the coordinator, which starts it anew elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ch15_helpers.disagg.decode import arriving_request
from ch15_helpers.disagg.handover import Arrival, nowhere
from ch15_helpers.disagg.leases import Lease, LeaseTable
from ch15_helpers.disagg.pool import Part, refs_of
from ch15_helpers.disagg.rank import RankServer, Stopwatch, heard
from ch15_helpers.disagg.recompute import recompute_blocks
from ch15_helpers.disagg.stages import DecodeEngine
from ch15_helpers.disagg.transfer import Transfer, TransferState
from ch15_helpers.serving.channel import Channel, Message
from ch15_helpers.serving.request import RequestOutput, SamplingParams
from ch15_helpers.speculative.engine import SpeculativeEngine


class DecodeServer(RankServer):
    """The loop of a decode rank."""

    def __init__(self, *arguments: Any, listener: socket.socket, token: str) -> None:
        """``listener`` is where prefill ranks connect, who must know the ``token``."""
        super().__init__(*arguments)
        self._listener, self._token = listener, token
        listener.setblocking(False)
        self._strangers: list[Channel] = []
        self._sources: dict[int, Channel] = {}
        assert isinstance(self.engine, DecodeEngine)
        self._scheduler = self.engine.scheduler
        self._leases = LeaseTable(time.monotonic, self._lease_over)
        self._waiting: deque[Arrival] = deque()  # for blocks
        self._open: dict[int, Arrival] = {}
        self._reserved: dict[int, int] = {}  # tickets of leases
        self._adopted: dict[int, Arrival] = {}
        self._of_transfer: dict[Transfer, Arrival] = {}
        self._unwanted: list[int] = []
        self._speculation = (0, 0)

    @property
    def num_handovers(self) -> int:
        """See RankServer."""
        return len(self._open) + len(self._waiting)

    @property
    def is_ready(self) -> bool:
        """See RankServer."""
        complete = any(arrival.is_complete for arrival in self._open.values())
        return complete or self._scheduler.has_runnable or bool(self._unwanted)

    def ears(self) -> Sequence[Any]:
        """See RankServer."""
        return [self._listener, *self._strangers, *self._sources.values()]

    # ---- messages ----------------------------------------------------------------------------

    def hear_peers(self) -> bool:
        """Messages of prefill ranks; one that is gone gives up what it had not finished."""
        if len(self._sources) < self.spec.num_prefill:
            self._accept()
        happened = False
        for rank, channel in list(self._sources.items()):
            for message in heard(channel):
                happened = True
                self._hear(rank, message)
            if channel.closed:
                del self._sources[rank]
                self.peer_gone(rank)
                for arrival in [*self._waiting, *self._open.values()]:
                    if arrival.source == rank and not arrival.is_complete:
                        self._drop(arrival)
        return happened

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._strangers.append(Channel(self._listener.accept()[0]))
        for channel in list(self._strangers):
            messages = heard(channel)
            if not messages and not channel.closed:
                continue
            self._strangers.remove(channel)
            if messages and messages[0].get("token") == self._token:
                self._sources[int(messages[0]["rank"])] = channel
                for message in messages[1:]:
                    self._hear(int(messages[0]["rank"]), message)
            else:
                channel.close()

    def _hear(self, source: int, message: Message) -> None:
        attempt = message["attempt"]
        arrival = self._open.get(attempt)
        if message["op"] == "reserve":
            self._ask(source, message)
        elif message["op"] == "part":
            self._receive(source, message, arrival)
        elif message["op"] == "drop":
            waiting = [each for each in self._waiting if each.attempt == attempt]
            for each in [*waiting, *([arrival] if arrival else [])]:
                self._drop(each)
        elif arrival is not None:
            self._renew(arrival)
            if message["op"] == "final":
                arrival.token, arrival.first_s = message["token"], message["first_s"]
                arrival.num_parts = message["num_parts"]

    def _say(self, arrival: Arrival, message: Message) -> None:
        channel = self._sources.get(arrival.source)
        if channel is not None:
            before = channel.num_sent_bytes
            channel.send({**message, "attempt": arrival.attempt})
            arrival.notes["metadata_bytes"] += channel.num_sent_bytes - before
            arrival.notes["num_messages"] += 1

    # ---- blocks ------------------------------------------------------------------------------

    def _ask(self, source: int, message: Message) -> None:
        """A prefill rank asks for blocks; it gets them now, later or never."""
        attempt, params = message["attempt"], SamplingParams(**message["params"])
        model, arrival_s = self.engine.model, message["arrival_s"]
        request = arriving_request(str(attempt), message["prompt"], params, model, arrival_s)
        arrival = Arrival(attempt, source, request, time.monotonic(), plan=message["plan"])
        reason = self._scheduler.residency.why_never(request)
        if reason is not None:
            self._say(arrival, {"op": "refuse", "error": reason})
            return
        self._waiting.append(arrival)

    def _grant(self) -> bool:
        """Reserve blocks for those that wait, in their order."""
        happened = False
        while self._waiting:
            arrival = self._waiting[0]
            # Preempted requests come first.
            if self._scheduler.num_waiting or not self._scheduler.can_reserve(arrival.request):
                break
            self._waiting.popleft()
            arrival.ticket = self._scheduler.reserve(arrival.request)
            table = self._scheduler.blocks.table(arrival.request.request_id)
            timeout_s = self.spec.handover_timeout_s
            arrival.lease = self._leases.grant(arrival.attempt, table, timeout_s)
            arrival.refs = refs_of(table, arrival.attempt)
            self._reserved[arrival.attempt] = arrival.ticket
            self._open[arrival.attempt] = arrival
            arrival.notes["blocked_s"] = blocked_s = time.monotonic() - arrival.asked_s
            self.count(backpressure_s=blocked_s)
            for about in arrival.plan:
                self._expect(arrival, about)
            self._say(arrival, {"op": "grant", "plan": arrival.plan})
            happened = True
        return happened

    def _renew(self, arrival: Arrival) -> None:
        if arrival.lease is not None:
            self._leases.renew(arrival.lease, self.spec.handover_timeout_s)
        for transfer in arrival.transfers:
            self.transport.extend(transfer, self.spec.handover_timeout_s)

    def _receive(self, source: int, message: Message, arrival: Arrival | None) -> None:
        """A part is coming. One that is not wanted is received all the same, into nowhere."""
        about, attempt = message["part"], message["attempt"]
        if arrival is None or arrival.lease is None:
            refs, part = nowhere(about, attempt, self.pool.heads)
            sink = self.transport.receive(refs, source=source, channel=attempt, part=part)
            self.transport.cancel(sink)
            return
        self._renew(arrival)
        self._expect(arrival, about)

    def _expect(self, arrival: Arrival, about: Sequence[int]) -> None:
        """Start to receive a part, described as in a plan."""
        first, last, low, high = about
        transfer = self.transport.receive(
            arrival.refs[first:last],
            source=arrival.source,
            channel=arrival.attempt,
            part=Part((low, high), self.pool.heads),
            lease=arrival.lease,
        )
        arrival.transfers.append(transfer)
        self._of_transfer[transfer] = arrival
        self.count(num_parts=1, num_bytes=transfer.num_bytes)

    def finished(self, transfer: Transfer) -> None:
        """See RankServer."""
        arrival = self._of_transfer.pop(transfer, None)
        if arrival is None:
            return
        arrival.notes["place_s"] += transfer.place_s
        if transfer.state is TransferState.DONE:
            self._renew(arrival)
            arrival.damaged |= set(transfer.to_recompute)
        elif arrival.attempt in self._open:
            self._lose(arrival, f"a part ended as {transfer.state.value}: {transfer.error}")

    def after_poll(self) -> bool:
        """See RankServer."""
        for lease in self._leases.expire():
            late = self._open.get(int(str(lease.owner)))
            if late is not None:
                self._lose(late, f"nothing was heard for {self.spec.handover_timeout_s:g} s")
        return self._grant()

    # ---- giving up ---------------------------------------------------------------------------

    def cancel(self, attempt: int) -> None:
        """See RankServer."""
        arrival = self._open.get(attempt)
        for each in [*(a for a in self._waiting if a.attempt == attempt), arrival]:
            if each is not None:
                self._drop(each)
        if attempt in self._adopted:
            self._unwanted.append(attempt)

    def _lose(self, arrival: Arrival, reason: str) -> None:
        self.count(num_lost=1)
        self._say(arrival, {"op": "gone"})
        self.channel.send({"op": "lost", "attempt": arrival.attempt, "reason": reason})
        self._drop(arrival)

    def _drop(self, arrival: Arrival) -> None:
        """Forget a handover; its blocks are free once nothing can be written to them."""
        if arrival in self._waiting:
            self._waiting.remove(arrival)
            return
        if self._open.pop(arrival.attempt, None) is None:
            return
        for transfer in arrival.transfers:
            self.transport.cancel(transfer)
        if arrival.lease is not None:
            self._leases.release(arrival.lease)

    def _lease_over(self, lease: Lease) -> None:
        ticket = self._reserved.pop(int(str(lease.owner)), None)
        if ticket is not None:  # not taken in
            self._scheduler.withdraw(ticket, "its blocks did not come")

    # ---- decoding ----------------------------------------------------------------------------

    def work(self) -> None:
        """Take in what is complete, and run a step."""
        for arrival in [each for each in self._open.values() if each.is_complete]:
            watch = Stopwatch(self.transport)
            self._repair(arrival)
            self._take_in(arrival)
            lap_s = watch.lap_s() if not arrival.damaged else 0.0
            arrival.notes["control_s"] += lap_s
            self.count(control_s=lap_s)
        if self._scheduler.has_runnable:
            for output in self.engine.step():
                self._ended(output)
        for attempt in self._unwanted:  # not in the middle of a step
            self.engine.abort(str(attempt))
        self._unwanted.clear()

    def _repair(self, arrival: Arrival) -> None:
        if not arrival.damaged:
            return
        assert arrival.lease is not None
        prompt = arrival.request.prompt_token_ids
        backend = self.engine.config.attention_backend
        model, cache, table = self.engine.model, self.engine.cache, arrival.lease.blocks
        wrong = sorted(arrival.damaged)
        recompute_blocks(model, cache, table, prompt, wrong, attention_backend=backend)
        self.count(num_recomputed=len(wrong))

    def _take_in(self, arrival: Arrival) -> None:
        request, lease = arrival.request, arrival.lease
        assert lease is not None
        del self._open[arrival.attempt]
        del self._reserved[arrival.attempt]
        self._leases.release(lease)  # the blocks are the request's now
        assert isinstance(self.engine, DecodeEngine)
        self.engine.arrive(arrival.ticket, arrival.token, arrival.first_s)
        landed = [transfer.finished_s for transfer in arrival.transfers]
        arrival.notes |= {
            "landed": landed,
            "landed_s": max(at for at in landed if at is not None),
            "taken_s": time.monotonic(),
            "first_s": arrival.first_s,
            "prompt_tokens": request.num_prompt_tokens,
        }
        self._adopted[arrival.attempt] = arrival
        self.count(num_handovers=1)
        self.channel.send({"op": "adopted", "attempt": arrival.attempt})

    def _ended(self, output: RequestOutput) -> None:
        attempt = int(output.request_id)
        arrival = self._adopted.pop(attempt, None)
        if arrival is None or output.finish_reason == "abort":
            return
        times_s = arrival.request.token_times_s
        arrival.notes["second_s"] = times_s[1] if len(times_s) > 1 else arrival.notes["taken_s"]
        self.channel.send(
            {
                "op": "done",
                "attempt": attempt,
                "token_ids": output.token_ids,
                "times_s": times_s,
                "finish_reason": output.finish_reason,
                "error": output.error,
                "preemptions": arrival.request.num_preemptions,
                "notes": arrival.notes,
            }
        )

    def share(self, control_s: float) -> None:
        """See RankServer."""
        each = control_s / max(1, self.num_handovers)
        for arrival in [*self._open.values(), *self._waiting]:
            arrival.notes["control_s"] += each

    def current_stats(self) -> Any:
        """See RankServer; with what became of drafts."""
        if isinstance(self.engine, SpeculativeEngine):
            stats = self.engine.stats
            drafted, accepted = stats.num_drafted, stats.num_accepted
            before = self._speculation
            self._speculation = (drafted, accepted)
            self.count(num_drafted=drafted - before[0], num_accepted=accepted - before[1])
        return super().current_stats()
