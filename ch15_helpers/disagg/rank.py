"""What prefill and decode ranks have in common: messages, transport, one engine, one loop."""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ch15_helpers.disagg.layer_watch import LayerWatch
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.pool import RegisteredPool
from ch15_helpers.disagg.rank_wire import RankWire
from ch15_helpers.disagg.results import RankStats
from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.disagg.stages import LayerwiseRunner
from ch15_helpers.disagg.transfer import Transfer
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import Wire
from ch15_helpers.errors import ReplicaError
from ch15_helpers.serving.channel import Channel, Message
from ch15_helpers.serving.engine import Engine, StepRecord
from ch15_helpers.serving.step import Step
from ch15_helpers.speculative.engine import SpeculativeEngine

_POLL_S = 5e-4  # while bytes are under way and there is nothing to compute
_LOOK_S = 0.05  # for leases that end


class Stopwatch:
    """Processor time of this thread for control: copies and digests are not counted."""

    def __init__(self, transport: BlockTransport) -> None:
        self._transport = transport
        self._start = self._now()

    def lap_s(self) -> float:
        """Since the start, or since the last lap."""
        now = self._now()
        lap, self._start = now - self._start, now
        return lap

    def _now(self) -> float:
        return time.thread_time() - self._transport.copy_processor_s


class RankServer:
    """Serves the coordinator at the other end of a channel; see ``prefill_rank``, ``decode_rank``.

    One thread does everything. While the model runs, ``pump`` is called after every layer, so that
    messages and transfers go on.
    """

    def __init__(
        self, rank: int, spec: DisaggSpec, engine: Engine, wire: Wire, channel: Channel
    ) -> None:
        self.rank, self.spec, self.engine, self.channel = rank, spec, engine, channel
        self.wire = RankWire(wire, time.monotonic)
        self.transport = BlockTransport(
            self.wire,
            clock=time.monotonic,
            verify=spec.verify,
            max_message_bytes=spec.max_message_bytes,
            default_timeout_s=spec.handover_timeout_s,
        )
        self.pool = RegisteredPool(engine.cache)
        self.transport.register(self.pool)
        engine.on_step = self._on_step
        if isinstance(engine.runner, LayerwiseRunner):
            engine.runner.on_layer = self.on_layer
            if engine.model.device.type == "cuda":
                stream = torch.cuda.Stream(engine.model.device)  # type: ignore[no-untyped-call]
                engine.runner.watch = LayerWatch(stream, self.pump)
        self.overlap = True
        self.counts: Counter[str] = Counter()
        self._peaks = {"max_batch": 0, "peak_blocks": 0}
        self._network: LinkModel | None = None
        self._stopped = False
        self._beaten_s = 0.0
        self._late_before = 0

    # ---- the loop --------------------------------------------------------------------------

    @torch.inference_mode()  # for all buffers alike: some are made in the middle of a step
    def run(self) -> None:
        """Serve until told to stop, or until the coordinator is gone."""
        while not self._stopped and not self.channel.closed:
            if not self.is_ready:
                self._rest()
            self.pump()
            self.work()
            self._beat()

    def pump(self) -> None:
        """Read messages and let transfers go on, without waiting."""
        for message in self.channel.receive():
            self._handle(message)
        watch = Stopwatch(self.transport)
        happened = self.hear_peers()
        for transfer in self.transport.poll():
            self.finished(transfer)
            happened = True
        if self.after_poll() or happened:  # to look in vain is waiting, not control
            self.charge(watch)

    def charge(self, watch: Stopwatch) -> None:
        """Count a lap as control of the handovers that are under way."""
        lap_s = watch.lap_s()
        self.counts["control_s"] += lap_s  # type: ignore[assignment]
        self.share(lap_s)

    def _rest(self) -> None:
        bell = self.wire.bell
        if self.transport.num_pending and bell is None:
            self.wire.wait(_POLL_S)
            return
        ears = [self.channel, *self.ears(), *([] if bell is None else [bell])]
        limit_s = min(self.spec.beat_s, _LOOK_S) if self.num_handovers else self.spec.beat_s
        event_s = self.wire.next_event_s()
        if event_s is not None:
            limit_s = max(0.0, min(limit_s, event_s - time.monotonic()))
        select.select([ear for ear in ears if ear.fileno() >= 0], [], [], limit_s)

    # ---- what the two roles do differently ---------------------------------------------------

    @property
    def num_handovers(self) -> int:
        """Handovers that this rank takes part in now."""
        raise AssertionError("each role says so")

    @property
    def is_ready(self) -> bool:
        """Whether ``work`` has something to do."""
        return self.engine.has_unfinished

    def ears(self) -> Sequence[Any]:
        """What else can bring messages."""
        return ()

    def hear_peers(self) -> bool:
        """Read what the other side sent; whether there was anything."""
        return False

    def finished(self, transfer: Transfer) -> None:
        """A transfer is over."""

    def after_poll(self) -> bool:
        """Transfers and messages have been looked after; whether that led to anything."""
        return False

    def link_changes(self) -> None:
        """The next run is over another network than the last."""

    def share(self, control_s: float) -> None:
        """Charge time for control to the handovers that are under way."""

    def work(self) -> None:
        """Run a step, if there is one, and hand on what ended."""

    def on_layer(self, step: Step, layer: int) -> None:
        """A layer of the running step is done."""
        self.pump()

    def peer_gone(self, rank: int) -> None:
        """A rank of the other side is gone, and with it whatever was under way."""
        self.wire.lose(rank, f"rank {rank} is gone")

    def cancel(self, attempt: int) -> None:
        """Nobody wants this attempt any more."""

    def handle(self, message: Message) -> None:
        """A message of the coordinator that only this role knows."""

    # ---- inside ------------------------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        operation = message["op"]
        if operation == "cancel":
            for attempt in message["attempts"]:
                self.cancel(attempt)
        elif operation == "configure":
            self._configure(message)
        elif operation == "fault":
            self.wire.fail(message["fault"], message["count"])
        elif operation == "mend":
            self.wire.mend()
        elif operation == "damage":
            for block in range(self.engine.cache.num_blocks):
                self.engine.cache.corrupt_block(block, "scramble")
        elif operation == "stats":
            self.channel.send({"op": "stats", **asdict(self.current_stats())})
        elif operation == "stop":
            self._stopped = True
        else:
            self.handle(message)

    def _configure(self, message: Message) -> None:
        """A new run begins: nothing is under way."""
        network = None if message["network"] is None else LinkModel(**message["network"])
        if network != self._network:
            self._network = network
            self.link_changes()
        self.wire.simulate(network)
        self.overlap = message["overlap"]
        if isinstance(self.engine, SpeculativeEngine):
            self.engine.set_lengths(message["draft_length"])
        self.counts.clear()
        self._peaks = dict.fromkeys(self._peaks, 0)
        self._late_before = self.transport.num_late
        vocab_size = self.engine.model.config.vocab_size
        self.channel.send({"op": "configured", "vocab_size": vocab_size})

    def current_stats(self) -> RankStats:
        """The counts, with what is only known now."""
        return RankStats(
            rank=self.rank,
            role=self.spec.role(self.rank),
            num_blocks=self.engine.cache.num_blocks,
            used_blocks=self.engine.scheduler.blocks.allocator.num_used,
            num_late=self.transport.num_late - self._late_before,
            **self._peaks,
            **self.counts,
        )

    def count(self, **more: float) -> None:
        """Add to counts, which are named as in RankStats."""
        for name, value in more.items():
            self.counts[name] += value  # type: ignore[assignment]

    def _on_step(self, record: StepRecord) -> None:
        step, peaks = record.step, self._peaks
        self.count(num_steps=1, num_tokens=step.num_tokens, busy_s=record.end_s - record.start_s)
        used = self.engine.cache.num_blocks - record.num_free_blocks
        peaks["max_batch"] = max(peaks["max_batch"], len(step.requests))
        peaks["peak_blocks"] = max(peaks["peak_blocks"], used)

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beaten_s >= self.spec.beat_s and not self.channel.num_unsent_bytes:
            self._beaten_s = now_s
            self.channel.send({"op": "beat"})


def heard(channel: Channel) -> list[Message]:
    """Messages of a peer; one that does not keep to the protocol counts as gone."""
    try:
        return channel.receive()
    except ReplicaError:
        channel.close()
        return []
