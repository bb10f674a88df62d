"""A prefill rank: computes prompts chunk by chunk, and sends their keys and values layer by layer.

For each request it asks the decode rank for blocks when the first chunk starts, sends the parts
that are computed as soon as it has them, and the first token at the end. Blocks that are being
sent are kept by tables of their own, so the engine may be done with them before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ch15_helpers.disagg.decode import arriving_request
from ch15_helpers.disagg.handover import Handover, ReadyPart, nowhere
from ch15_helpers.disagg.overlap import Pace, part_ends
from ch15_helpers.disagg.pool import Part
from ch15_helpers.disagg.rank import RankServer, Stopwatch, heard
from ch15_helpers.disagg.transfer import Transfer, TransferState
from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.channel import Channel, Message
from ch15_helpers.serving.engine import StepRecord
from ch15_helpers.serving.request import Request, RequestOutput, SamplingParams
from ch15_helpers.serving.step import ScheduledChunk, Step


class PrefillServer(RankServer):
    """The loop of a prefill rank."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._peers: dict[int, Channel] = {}
        self._open: dict[int, Handover] = {}
        self._of_transfer: dict[Transfer, Handover] = {}
        self._num_layers = self.engine.model.config.num_hidden_layers
        self._part_ends: frozenset[int] = frozenset()  # of the step that runs
        self._pace, self._layer_bytes = Pace(), self.pool.row_bytes(Part((0, 1), self.pool.heads))
        self._first_layer_s = 0.0
        self._unwanted: list[int] = []
        self._first_layer = 0  # of the part that is being computed
        # A wire that ignores channels matches what both sides start in the same order, and parts of
        # several prompts alternate. NIXL has few buffers, and a receive would keep one for long.
        self._can_plan = not self.wire.in_order and self.spec.transport != "nixl"

    @property
    def num_handovers(self) -> int:
        """See RankServer."""
        return len(self._open)

    def ears(self) -> Sequence[Any]:
        """See RankServer."""
        return list(self._peers.values())

    # ---- messages ----------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """``peers``: where decode ranks listen. ``prefill``: a request."""
        if message["op"] == "peers":
            for rank, address in message["addresses"].items():
                host, _, port = address.rpartition(":")
                channel = Channel.connect(host, int(port))
                channel.send({"op": "hello", "rank": self.rank, "token": message["token"]})
                self._peers[int(rank)] = channel
        elif message["op"] == "prefill":
            self._begin(message)

    def _begin(self, message: Message) -> None:
        attempt, params = message["attempt"], SamplingParams(**message["params"])
        one = replace(params, max_tokens=1)
        try:
            self.engine.add_request(
                message["prompt"], one, request_id=str(attempt), arrival_s=message["arrival_s"]
            )
        except InvalidRequestError as error:
            self._answer(attempt, [], [], "error", str(error))
            return
        self._open[attempt] = Handover(
            attempt, message["target"], message["prompt"], params, message["arrival_s"]
        )

    def hear_peers(self) -> bool:
        """``grant``: blocks are reserved. ``refuse``: they never will be. ``gone``: given up."""
        happened = False
        for rank, channel in self._peers.items():
            for message in heard(channel):
                happened = True
                handover = self._open.get(message["attempt"])
                if handover is None:
                    if message["op"] == "grant":  # given up meanwhile
                        self._send_void(rank, message["attempt"], message["plan"])
                    continue
                if message["op"] == "grant":
                    handover.granted = True
                    assert handover.asked_s is not None
                    handover.notes["metadata_s"] = time.monotonic() - handover.asked_s
                elif message["op"] == "refuse":
                    self._answer(handover.attempt, [], [], "error", message["error"])
                    self._forget(handover)
                else:
                    self._forget(handover)
            if channel.closed:
                self.peer_gone(rank)
                for handover in [h for h in self._open.values() if h.target == rank]:
                    if handover.asked_s is not None:
                        self._lose(handover, f"decode rank {rank} is gone")
        return happened

    def _say(self, handover: Handover, message: Message) -> None:
        channel = self._peers[handover.target]
        before = channel.num_sent_bytes
        channel.send({**message, "attempt": handover.attempt})
        handover.notes["metadata_bytes"] += channel.num_sent_bytes - before
        handover.notes["num_messages"] += 1
        handover.spoken_s = time.monotonic()

    # ---- computing ---------------------------------------------------------------------------

    def work(self) -> None:
        """One step of prompts."""
        if self.engine.has_unfinished:
            for output in self.engine.step():
                self._computed(output)
        for attempt in self._unwanted:  # not in the middle of a step
            self.engine.abort(str(attempt))
        self._unwanted.clear()
        watch = Stopwatch(self.transport)
        if self.after_poll():
            self.charge(watch)

    def on_layer(self, step: Step, layer: int) -> None:
        """Send what the layer has completed."""
        end = layer + 1
        if layer == 0 or end in self._part_ends:
            watch = Stopwatch(self.transport)
            if layer == 0:
                self._first_layer = 0
                self._plan(step)
                self._ask_for_blocks(step)
            if end in self._part_ends:
                self._add_parts(step, (self._first_layer, end), end == self._num_layers)
                self._first_layer = end
            if end == self._num_layers:
                seconds = time.monotonic() - self._first_layer_s
                self._pace.computed(step.num_tokens, layer, seconds)
            self.charge(watch)
        self.pump()

    def _plan(self, step: Step) -> None:
        """After which layers of this step parts are sent."""
        self._first_layer_s = time.monotonic()
        last = sum(chunk.num_tokens for chunk in step.chunks if chunk.is_last)
        to_send = last * self._layer_bytes // self.engine.cache.block_size
        ratio = self._pace.ratio(step.num_tokens, to_send)
        size = self.spec.layers_per_part if self.overlap else self._num_layers
        self._part_ends = frozenset(part_ends(self._num_layers, size, ratio))

    def _ask_for_blocks(self, step: Step) -> None:
        for chunk in step.chunks:
            handover = self._open.get(int(chunk.request.request_id))
            if handover is None or handover.asked_s is not None or handover.params.max_tokens == 1:
                continue
            handover.asked_s = time.monotonic()
            params = {name: getattr(handover.params, name) for name in _PARAMS}
            if self._can_plan and chunk.is_last:
                ends = sorted(self._part_ends) if self.overlap else [self._num_layers]
                handover.promise(self._whole_blocks(chunk), ends)
            about = {"prompt": handover.prompt, "params": params, "arrival_s": handover.arrival_s}
            self._say(handover, {"op": "reserve", "plan": handover.plan, **about})

    def _add_parts(self, step: Step, layers: tuple[int, int], step_ends: bool) -> None:
        """These layers of the step's chunks are computed."""
        for chunk in step.chunks:
            handover = self._open.get(int(chunk.request.request_id))
            if handover is None or handover.asked_s is None:
                continue
            in_pieces = self.overlap and chunk.is_last
            if not in_pieces and not (step_ends and (self.overlap or chunk.is_last)):
                continue
            start, stop = handover.num_blocks, self._whole_blocks(chunk)
            if start < stop:
                of_part = layers if in_pieces else (0, self._num_layers)
                self._add_part(handover, chunk.request, (start, stop), of_part)
            if step_ends:
                handover.num_blocks = stop

    def _whole_blocks(self, chunk: ScheduledChunk) -> int:
        """Leading blocks that no later chunk writes to."""
        size, end = self.engine.cache.block_size, chunk.start + chunk.num_tokens
        return -(-end // size) if chunk.is_last else end // size

    def _add_part(
        self, handover: Handover, request: Request, blocks: tuple[int, int], layers: tuple[int, int]
    ) -> None:
        manager = self.engine.scheduler.blocks
        table = manager.table(request.request_id)[slice(*blocks)]
        name = ("part", handover.attempt, handover.num_parts)
        manager.adopt(name, table)
        self.engine.scheduler.num_guests += 1
        handover.add(name, table, blocks[0], Part(layers, self.pool.heads))

    def _computed(self, output: RequestOutput) -> None:
        """A prompt is done: its first token is known."""
        attempt, tokens = int(output.request_id), output.token_ids
        handover = self._open.get(attempt)
        if handover is None or output.finish_reason == "abort":
            return
        times_s = [] if not tokens else [handover.arrival_s + (output.metrics.ttft_s or 0.0)]
        params, model = handover.params, self.engine.model
        whole = arriving_request("", handover.prompt, params, model, handover.arrival_s)
        stops = bool(tokens) and tokens[0] in whole.stop_ids
        if output.error is not None or stops or handover.asked_s is None:
            self._answer(attempt, tokens, times_s, output.finish_reason, output.error)
            self._give_up(handover)
            return
        handover.token, handover.first_s = tokens[0], times_s[0]
        self.channel.send({"op": "first", "attempt": attempt, "at_s": handover.first_s})

    # ---- sending -----------------------------------------------------------------------------

    def after_poll(self) -> bool:
        """Send what is ready to whoever has blocks for it."""
        happened = False
        for handover in list(self._open.values()):
            if handover.granted and (self.overlap or handover.token is not None):
                while handover.queue:
                    self._send(handover, handover.queue.popleft())
                    happened = True
                if handover.token is not None and not handover.final_sent:
                    self._finish(handover)
            self._keep_alive(handover)
        return happened

    def _send(self, handover: Handover, part: ReadyPart) -> None:
        if not handover.plan:
            about = [part.refs[0].index, part.refs[-1].index + 1, *part.part.layers]
            self._say(handover, {"op": "part", "part": about})
        handover.num_sent += 1
        transfer = self.transport.send(
            part.refs, to=handover.target, channel=handover.attempt, part=part.part
        )
        handover.under_way[transfer] = part
        self._of_transfer[transfer] = handover
        self.count(num_parts=1, num_bytes=transfer.num_bytes)
        handover.notes["parts"].append((transfer.started_s, part.ready_s, transfer.num_bytes))

    def _finish(self, handover: Handover) -> None:
        about = {"token": handover.token, "first_s": handover.first_s}
        self._say(handover, {"op": "final", "num_parts": handover.num_parts, **about})
        handover.final_sent = True
        self._check_done(handover)

    def finished(self, transfer: Transfer) -> None:
        """See RankServer: its blocks are free for other use."""
        handover = self._of_transfer.pop(transfer, None)
        if handover is None:
            return
        self._free(handover.under_way.pop(transfer).name)
        handover.notes["pack_s"] += transfer.pack_s
        if transfer.state is TransferState.DONE:
            assert transfer.finished_s is not None
            self._pace.sent(transfer.num_bytes, transfer.finished_s - transfer.started_s)
            self._check_done(handover)
        elif handover.attempt in self._open:
            self._lose(handover, f"a send ended as {transfer.state.value}: {transfer.error}")

    def _check_done(self, handover: Handover) -> None:
        if handover.final_sent and not handover.under_way and handover.attempt in self._open:
            self.count(num_handovers=1)
            del self._open[handover.attempt]
            self.channel.send({"op": "handed", "attempt": handover.attempt, **handover.notes})

    def _keep_alive(self, handover: Handover) -> None:
        """Renew the lease of a handover whose prompt takes long."""
        silent_s = time.monotonic() - handover.spoken_s
        if handover.granted and silent_s > self.spec.handover_timeout_s / 4:
            self._say(handover, {"op": "keep"})

    # ---- giving up ---------------------------------------------------------------------------

    def cancel(self, attempt: int) -> None:
        """See RankServer."""
        if attempt in self._open:
            self._give_up(self._open[attempt])

    def _lose(self, handover: Handover, reason: str) -> None:
        self.count(num_lost=1)
        self.channel.send({"op": "lost", "attempt": handover.attempt, "reason": reason})
        self._give_up(handover)

    def _give_up(self, handover: Handover) -> None:
        if handover.asked_s is not None and handover.attempt in self._open:
            self._say(handover, {"op": "drop"})
        self._forget(handover)

    def _forget(self, handover: Handover) -> None:
        if self._open.pop(handover.attempt, None) is None:
            return
        self._unwanted.append(handover.attempt)
        while handover.queue:
            self._free(handover.queue.popleft().name)
        for transfer in list(handover.under_way):
            self.transport.cancel(transfer)
        if handover.granted:
            unsent = handover.plan[handover.num_sent :]
            self._send_void(handover.target, handover.attempt, unsent)

    def _send_void(self, target: int, attempt: int, plan: list[list[int]]) -> None:
        """What a decode rank waits for does not come."""
        for about in plan:
            refs, part = nowhere(about, attempt, self.pool.heads)
            self.transport.send_void(refs, to=target, channel=attempt, part=part)

    def _free(self, name: tuple[str, int, int]) -> None:
        self.engine.scheduler.blocks.free(name)
        self.engine.scheduler.num_guests -= 1

    def link_changes(self) -> None:
        """See RankServer."""
        self._pace.forget_link()

    def share(self, control_s: float) -> None:
        """See RankServer."""
        each = control_s / max(1, len(self._open))
        for handover in self._open.values():
            handover.notes["control_s"] += each

    def _on_step(self, record: StepRecord) -> None:
        super()._on_step(record)
        for chunk in record.step.chunks:
            handover = self._open.get(int(chunk.request.request_id))
            if handover is not None:
                handover.computed(record.start_s, record.end_s)

    def _answer(
        self,
        attempt: int,
        tokens: list[int],
        times_s: list[float],
        reason: str,
        error: str | None,
    ) -> None:
        """The request ends here."""
        answer = {"token_ids": tokens, "times_s": times_s, "finish_reason": reason}
        self.channel.send({"op": "done", "attempt": attempt, "error": error, **answer})


_PARAMS = tuple(SamplingParams.__dataclass_fields__)
