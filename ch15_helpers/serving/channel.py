"""JSON messages over a socket, each after its length. What router and replicas speak.

Why not ``torch.distributed``: in a process group a dead peer fails everybody's next call, and a
receive blocks. A socket per replica tells of a death at once (the kernel closes it), concerns
nobody else, and can be waited for beside others. Messages are data, never pickled objects.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Mapping
from typing import Any

from ch15_helpers.errors import ReplicaError

Message = dict[str, Any]

_HEAD_BYTES = 4
_READ_BYTES = 1 << 16
_ENCODER = json.JSONEncoder(separators=(",", ":"))
MAX_MESSAGE_BYTES = 64 * 1024**2


class Channel:
    """One end of a connection. It never blocks: what cannot be written yet waits in memory.

    Attributes:
        closed: the other end is gone, or ``close`` was called.
        num_sent_bytes: of all messages so far, those still unsent included.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._inbox = bytearray()
        self._outbox = bytearray()
        self.closed = False
        self.num_sent_bytes = 0

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float = 30.0) -> Channel:
        """Connect to a listening router. Raises OSError when there is none."""
        return cls(socket.create_connection((host, port), timeout=timeout_s))

    def fileno(self) -> int:
        """For ``select``; -1 after ``close``."""
        return self._socket.fileno()

    @property
    def local_host(self) -> str:
        """Address of this end: where others on the same network reach this process."""
        return str(self._socket.getsockname()[0])

    @property
    def num_unsent_bytes(self) -> int:
        """What waits for the other end to read."""
        return len(self._outbox)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send or keep for later; to an end that is gone it does nothing."""
        if self.closed:
            return
        body = _ENCODER.encode(message).encode()
        if len(body) > MAX_MESSAGE_BYTES:
            raise ReplicaError(
                f"a message of {len(body):,} bytes; at most {MAX_MESSAGE_BYTES:,} can be sent"
            )
        self._outbox += len(body).to_bytes(_HEAD_BYTES, "little") + body
        self.num_sent_bytes += _HEAD_BYTES + len(body)
        self.flush()

    def flush(self) -> None:
        """Write as much as the other end takes."""
        try:
            while self._outbox and not self.closed:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def receive(self, timeout_s: float = 0.0) -> list[Message]:
        """All whole messages that have arrived; waits for the first bytes at most that long.

        What had arrived before the other end went away is still handed out.

        Raises:
            ReplicaError: the bytes are not messages.
        """
        self.flush()
        if not self.closed:
            if timeout_s:
                writers = [self] if self._outbox else []
                select.select([self], writers, [], timeout_s)
                self.flush()
            self._read()
        return self._messages() if self._inbox else []

    def close(self) -> None:
        """End the connection; may be called again."""
        self.closed = True
        self._socket.close()

    def _read(self) -> None:
        try:
            while not self.closed:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    self.close()
                self._inbox += data
                if len(data) < _READ_BYTES:  # more would be asked for in vain
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        while len(self._inbox) >= _HEAD_BYTES:
            length = int.from_bytes(self._inbox[:_HEAD_BYTES], "little")
            if length > MAX_MESSAGE_BYTES:
                raise ReplicaError(f"the other end announces {length:,} bytes; not our protocol")
            end = _HEAD_BYTES + length
            if len(self._inbox) < end:
                break
            body = bytes(self._inbox[_HEAD_BYTES:end])
            del self._inbox[:end]
            messages.append(_parsed(body))
        return messages


def _parsed(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ReplicaError(f"the other end sent {body[:40]!r}, which is not JSON") from error
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ReplicaError(f"the other end sent {body[:40]!r}, which has no 'op'")
    return message
