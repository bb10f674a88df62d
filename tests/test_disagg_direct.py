"""Large messages: sent from the pool and received into it, without a copy and without harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from ch15_helpers.disagg import freight
from ch15_helpers.disagg.clock import VirtualClock
from ch15_helpers.disagg.faults import Fault, FaultyWire
from ch15_helpers.disagg.leases import Lease, LeaseTable
from ch15_helpers.disagg.pool import RegisteredPool, refs_of
from ch15_helpers.disagg.transfer import TransferState
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub, LocalWire, WireMessage
from ch15_helpers.errors import TransportError
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import TINY

SHAPE = replace(TINY, num_hidden_layers=4, num_key_value_heads=4, head_dim=64)
BLOCKS = 16  # of 128 KiB


class SpyWire(LocalWire):
    """Notes how messages travel."""

    early = False

    def __init__(self, hub: LocalHub, rank: int) -> None:
        super().__init__(hub, rank)
        self.direct: list[bool] = []
        self.borrowed: list[bool] = []
        self.own: list[set[int]] = []

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            rows = message.pieces[0].untyped_storage().data_ptr()
            self.borrowed.append(rows != message.buffer.untyped_storage().data_ptr())
            self.direct.append(message.direct)
            self.own.append(message.own)
        super().start(messages)

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        done = super().finished()
        for message, _ in done:
            for number in range(len(message.pieces)):  # as wires with threads do
                if self.early and message.arrived is not None:
                    message.arrived(number)
        return done


class Ends:
    """Rank 0 has content, rank 1 has zeros and leases."""

    def __init__(self, fault: Fault | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.clock, hub = VirtualClock(), LocalHub(2)
        self.caches = [PagedKVCache(SHAPE, BLOCKS, 16) for _ in range(2)]
        self.caches[0].pages.uniform_()
        self.wires = [SpyWire(hub, rank) for rank in range(2)]
        wires: list[Any] = list(self.wires)
        if fault is not None:
            wires[0] = FaultyWire(wires[0], fault, row=1)
        self.ends = [BlockTransport(wire, clock=self.clock, **options) for wire in wires]
        for end, cache in zip(self.ends, self.caches, strict=True):
            end.register(RegisteredPool(cache))
        self.ended: list[Lease] = []
        self.leases = LeaseTable(self.clock, on_end=self.ended.append)

    def receive(self, table: list[int], lease: Lease | None, **options: Any) -> Any:
        return self.ends[1].receive(
            refs_of(table, 1), source=0, channel=1, lease=lease, **options
        )  # fmt: skip

    def send(self, table: list[int]) -> Any:
        return self.ends[0].send(refs_of(table, 1), to=1, channel=1)


def test_neighbours_are_not_copied_and_others_are() -> None:
    for table, borrowed in (([3, 4, 5, 6], True), ([3, 5, 4, 6], False)):
        for other, direct in (([8, 9, 10, 11], True), ([8, 9, 11, 10], False)):
            ends = Ends()
            lease = ends.leases.grant("r", other, 9.0)
            receive = ends.receive(other, lease)
            ends.send(table)
            ends.ends[1].wait(receive)
            assert receive.report.is_clean
            assert torch.equal(ends.caches[1].pages[other], ends.caches[0].pages[table])
            assert ends.wires[0].borrowed == [borrowed] and ends.wires[1].direct == [direct]
            assert lease.pins == 0 and not ends.ended
            ends.leases.check_invariants()


def test_one_message_may_lie_in_the_pool_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two blocks: each is copied or not, on each side for itself."""
    monkeypatch.setattr(freight, "_PIECE_BYTES", 2 * 128 * 1024)
    ends = Ends()
    table, other = [3, 4, 9, 6, 0], [8, 10, 11, 12, 1]
    receive = ends.receive(other, ends.leases.grant("r", other, 9.0))
    send = ends.send(table)
    ends.ends[1].wait(receive)
    assert receive.report.is_clean and ends.ends[0].poll() == [send]
    assert torch.equal(ends.caches[1].pages[other], ends.caches[0].pages[table])
    assert ends.wires[0].own == [{0, 2}] and ends.wires[1].own == [{1, 2}]


def test_without_a_lease_nothing_goes_into_the_pool_unchecked() -> None:
    ends = Ends()
    receive = ends.receive([8, 9, 10, 11], None)
    ends.send([3, 4, 5, 6])
    ends.ends[1].wait(receive)
    assert ends.wires[1].direct == [False] and receive.report.is_clean


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("fault", get_args(Fault))
def test_faults_are_found_in_what_was_received_directly(fault: Fault, early: bool) -> None:
    ends = Ends(fault)
    ends.wires[1].early = early
    other = [8, 9, 10, 11]
    receive = ends.receive(other, ends.leases.grant("r", other, 9.0))
    ends.send([3, 4, 5, 6])
    ends.ends[1].wait(receive)
    assert ends.wires[1].direct == [True]
    bad = {"corrupt": [1], "exchange": [1, 2], "reorder": [1, 2], "drop": [1], "duplicate": [2]}
    if fault == "duplicate":
        assert receive.report.duplicated == {1}
    assert receive.to_recompute == bad[fault]
    for position, ok in enumerate(receive.ok):
        same = torch.equal(
            ends.caches[1].pages[other[position]], ends.caches[0].pages[3 + position]
        )
        assert same or not ok


@pytest.mark.parametrize("how", ["expire", "release", "cancel"])
def test_blocks_are_given_back_only_when_the_wire_has_let_go(how: str) -> None:
    ends = Ends()
    other = [8, 9, 10, 11]
    lease = ends.leases.grant("r", other, 1.0)
    receive = ends.receive(other, lease, timeout_s=1.0)
    assert lease.pins == 1
    if how == "expire":
        ends.ends[1].wait(receive)
        assert receive.state is TransferState.EXPIRED
        assert ends.leases.expire() == [lease]
    else:
        if how == "cancel":
            ends.ends[1].cancel(receive)
        assert ends.leases.release(lease)
    assert not lease.active and not ends.ended, "the wire may still write to the blocks"
    assert ends.leases.holder(8) is lease
    with pytest.raises(ValueError, match="leased"):
        ends.leases.grant("next", [8], 1.0)
    ends.leases.check_invariants()
    ends.send([3, 4, 5, 6])  # late
    ends.ends[1].poll()
    assert receive.state is not TransferState.DONE and receive.ok == [False] * 4
    assert ends.ended == [lease] and ends.leases.holder(8) is None
    ends.caches[1].pages[other] = 42.0
    ends.leases.grant("next", other, 1.0)
    ends.ends[1].poll()
    assert (ends.caches[1].pages[other] == 42.0).all()
    ends.leases.check_invariants()


@pytest.mark.parametrize("given_up", [False, True])
def test_a_void_send_ends_what_was_promised(given_up: bool) -> None:
    ends = Ends()
    other = [8, 9, 10, 11]
    lease = ends.leases.grant("r", other, 9.0)
    receive = ends.receive(other, lease, timeout_s=1.0)
    if given_up:
        ends.ends[1].cancel(receive)
        ends.leases.release(lease)
        assert not ends.ended and lease.pins
    else:
        ends.clock.advance_to(0.9)
        ends.ends[1].extend(receive, 1.0)
        ends.clock.advance_to(1.8)
    before = ends.caches[0].pages.clone()
    ends.ends[0].send_void(refs_of([0, 1, 2, 3], 1), to=1, channel=1)
    ends.ends[1].poll()
    assert receive.done and receive.ok == [False] * 4 and lease.pins == 0
    if given_up:
        assert ends.ended == [lease]
    else:
        assert receive.state is TransferState.DONE and receive.to_recompute == [0, 1, 2, 3]
    assert torch.equal(ends.caches[0].pages, before)
    assert (ends.caches[1].pages[:8] == 0).all() and (ends.caches[1].pages[12:] == 0).all()
    assert ends.ends[0].num_pending == 0
    for end in ends.ends:
        end.check_invariants()


def test_a_transfer_that_was_given_up_in_the_queue_never_aims_at_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SpyWire, "window", 1)
    ends = Ends(max_message_bytes=4 * (128 * 1024 + 48))
    table = list(range(BLOCKS))
    lease = ends.leases.grant("r", table, 9.0)
    first = ends.receive(table, lease)
    ends.ends[1].cancel(first)
    ends.leases.release(lease)
    ends.send(table)
    while ends.ends[0].poll() == []:
        ends.ends[1].poll()
    assert ends.wires[1].direct == [True, False, False, False]
    assert ends.ended == [lease]


def test_blocks_that_change_while_they_are_sent_are_noticed() -> None:
    """A sender whose lease ended gave its blocks away: what is read from them is not landed."""
    ends = Ends()
    send = ends.send([3, 4, 5, 6])
    assert ends.wires[0].borrowed == [True]
    ends.ends[0].cancel(send)
    ends.caches[0].pages[4] = 7.0
    receive = ends.receive([8, 9, 10, 11], None)
    ends.ends[1].wait(receive)
    assert receive.report.corrupted == {1} and receive.to_recompute == [1]
    assert (ends.caches[1].pages[9] == 0).all()


def test_a_lease_must_cover_the_transfer() -> None:
    ends = Ends()
    lease = ends.leases.grant("r", [8, 9], 9.0)
    with pytest.raises(TransportError, match="does not cover"):
        ends.receive([8, 9, 10], lease)
