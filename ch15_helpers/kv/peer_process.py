"""Starts a process that owns memory, and talks to it over gloo."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from ch15_helpers.errors import TierError
from ch15_helpers.kv.peer_main import (
    CLIENT,
    GET,
    HANDLE_LEN,
    LEND,
    OPEN,
    ORDER_LEN,
    PUT,
    SERVER,
    STOP,
    borrow,
    connect,
    make_store,
)


class PeerLost(Exception):
    """The other process does not answer any more."""


class PeerProcess:
    """A process that owns memory for one store. Whoever starts it closes it.

    Attributes:
        process: the child. bytes_sent, bytes_received: payload bytes so far, over gloo.
        device: the GPU whose memory it lends; None where it has only RAM.
    """

    def __init__(self, timeout_s: float = 10.0, device: str | None = None) -> None:
        """Start the process and connect to it (a few seconds: it imports torch).

        Args:
            timeout_s: an answer that takes longer counts as a lost peer.
            device: with ``cuda:N`` the process owns memory of that GPU, which this one then reads
                and writes over the device link, by itself.

        Raises:
            TierError: it does not start.
        """
        self.bytes_sent = self.bytes_received = 0
        self.device = device
        self._lost = False
        self._talk = threading.Lock()  # an order and its answer belong together
        start = timedelta(seconds=60)
        store = make_store(0, master=True)
        command = [sys.executable, "-m", "ch15_helpers.kv.peer_main", str(store.port)]
        command += [] if device is None else [device]
        said = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            self._group = connect(store, CLIENT, start)
        except RuntimeError as error:
            self.kill()
            said.seek(0)
            words = said.read().decode(errors="replace")[-500:]
            raise TierError(
                f"the peer process did not answer within {start} ({error}); it said: {words!r}"
            ) from error
        finally:
            said.close()  # the child has its own handle
        self._store = store  # gloo's addresses are in it
        self._timeout = timedelta(seconds=timeout_s)

    @property
    def lost(self) -> bool:
        """Whether it has failed to answer; it is never asked again then."""
        return self._lost

    @property
    def alive(self) -> bool:
        """Whether the process is there; asks the kernel, not the process."""
        return not self._lost and self.process.poll() is None

    def lend(self, num_slots: int, row_bytes: int, onto: torch.device) -> torch.Tensor:
        """Have it make zeroed memory on its GPU, and map it for kernels of ``onto``.

        What was lent before must not be used any more. The mapping outlives the process: a read
        that is under way when it dies still finds memory, and whoever reads asks ``alive`` after.

        Returns:
            uint8 [num_slots, row_bytes]; torch takes it for memory of ``onto``.

        Raises:
            TierError: it has no GPU.
            PeerLost: it does not answer; so it is when there is not enough memory.
        """
        if self.device is None:
            raise TierError("the peer process has no GPU to lend from; start it with a device")
        message = torch.zeros(HANDLE_LEN, dtype=torch.uint8)
        with self._talk:
            self._order(LEND, [], num_slots, row_bytes)
            self._receive(message)
        return borrow(message, num_slots, row_bytes, onto)

    def open(self, num_slots: int, row_bytes: int) -> None:
        """Have the peer make its memory, zeroed; what it had before is gone. Raises PeerLost."""
        with self._talk:
            self._order(OPEN, [], num_slots, row_bytes)
            self._receive(torch.zeros(1, dtype=torch.int64))

    def put(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        """Write uint8 rows [n, row bytes] into slots, n at most MOST. Raises PeerLost."""
        with self._talk:
            self._order(PUT, slots)
            self._send(rows)
            self._receive(torch.zeros(1, dtype=torch.int64))
        self.bytes_sent += rows.nbytes

    def get(self, slots: Sequence[int], row_bytes: int) -> torch.Tensor:
        """Rows of some slots, uint8 [n, row bytes]. Raises PeerLost."""
        rows = torch.empty((len(slots), row_bytes), dtype=torch.uint8)
        with self._talk:
            self._order(GET, slots)
            self._receive(rows)
        self.bytes_received += rows.nbytes
        return rows

    def close(self) -> None:
        """Tell it to end, and see that it does. Closing twice is fine."""
        if self.process.poll() is None and not self._lost:
            try:
                self._order(STOP, [])
                self.process.wait(timeout=5)
            except (PeerLost, subprocess.TimeoutExpired):
                pass
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def _order(self, action: int, slots: Sequence[int], num_slots: int = 0, row: int = 0) -> None:
        order = torch.zeros(ORDER_LEN, dtype=torch.int64)
        order[:4] = torch.tensor([action, len(slots), num_slots, row])
        order[4 : 4 + len(slots)] = torch.tensor(slots, dtype=torch.int64)
        self._send(order)

    def _send(self, tensor: torch.Tensor) -> None:
        self._finish(self._group.send, tensor)

    def _receive(self, tensor: torch.Tensor) -> None:
        self._finish(self._group.recv, tensor)

    def _finish(self, start: Callable[..., Any], tensor: torch.Tensor) -> None:
        if self._lost:
            raise PeerLost("the peer process was lost before")
        try:
            start([tensor], SERVER, 0).wait(self._timeout)
        except RuntimeError as error:
            self._lost = True
            raise PeerLost(str(error)) from error
