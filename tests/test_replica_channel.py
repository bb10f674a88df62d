"""Messages over a socket: whole, in order, without blocking, and only messages."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ch15_helpers.errors import ReplicaError
from ch15_helpers.serving import channel as module
from ch15_helpers.serving.channel import Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    sent = [{"op": "submit", "prompt": list(range(n)), "text": "é\n"} for n in (0, 3, 5000)]
    for message in sent:
        one.send(message)
    assert other.receive() == sent
    assert other.receive() == []


def test_an_end_that_does_not_read_blocks_nobody(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    big = {"op": "x", "data": "a" * 3_000_000}
    one.send(big)
    assert one.num_unsent_bytes > 0
    received = []
    while not received:
        received = other.receive()
        one.flush()
    assert received == [big]
    assert one.num_unsent_bytes == 0


def test_what_was_sent_before_the_end_is_read(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send({"op": "done"})
    one.close()
    assert other.receive() == [{"op": "done"}]
    assert other.receive() == []
    assert other.closed
    other.send({"op": "late"})  # to nobody: no error


@pytest.mark.parametrize(
    "data",
    [
        (3).to_bytes(4, "little") + b"abc",
        (2).to_bytes(4, "little") + b"[]",
        (2).to_bytes(4, "little") + b"{}",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_anything_else_is_an_error(data: bytes) -> None:
    raw, end = socket.socketpair()
    with raw:
        raw.sendall(data)
        with pytest.raises(ReplicaError):
            Channel(end).receive()


def test_a_message_has_a_largest_size(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(ReplicaError, match="at most 100"):
        ends[0].send({"op": "x", "data": "a" * 200})
