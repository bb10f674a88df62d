"""Messages over MPI, for processes that ``mpirun`` starts; with Open MPI's UCX layer, over UCX.

The Python bindings (mpi4py) are optional; importing them starts MPI, so it happens only here.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.disagg.wire import WireMessage
from ch15_helpers.errors import TransportError

_POLL_S = 2e-5
_HOST_TAGS = 32767  # what every MPI offers


class MpiWire:
    """One rank's end of ``MPI.COMM_WORLD``; buffers are in host memory.

    A receive that is given up stays posted, as on other wires: its data is dropped on arrival.
    """

    window = 4
    in_order = False
    zero_copy = True

    def __init__(self, communicator: Any = None) -> None:
        """``communicator`` is one that nobody else uses; None is a copy of the world.

        Raises:
            TransportError: mpi4py is not installed, or MPI does not start.
        """
        self._mpi = load_mpi()
        world = self._mpi.COMM_WORLD.Dup() if communicator is None else communicator
        self.communicator = world
        self.rank, self.world_size = world.Get_rank(), world.Get_size()
        self.device = torch.device("cpu")
        self._under_way: list[tuple[list[Any], WireMessage]] = []
        self._done: list[tuple[WireMessage, str | None]] = []
        self._channels: dict[int, set[int]] = defaultdict(set)
        self._pause = threading.Event()

    def new_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            post = self.communicator.Isend if message.sending else self.communicator.Irecv
            tag = self._tag(message.channel)
            try:
                requests = [post(p.numpy(), message.peer, tag) for p in message.take()]
            except self._mpi.Exception as error:
                self._done.append((message, str(error)))
                continue
            self._under_way.append((requests, message))

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        under_way = []
        for requests, message in self._under_way:
            try:
                over, error = self._mpi.Request.Testall(requests), None
            except self._mpi.Exception as problem:
                over, error = True, str(problem)
            if over:
                self._done.append((message, error))
                self._release(message.channel)
            else:
                under_way.append((requests, message))
        self._under_way = under_way
        done, self._done = self._done, []
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        # MPI moves data only while somebody asks for it.
        self._pause.wait(min(timeout_s, _POLL_S))

    def close(self) -> None:
        for requests, message in self._under_way:
            if not message.sending:
                for request in requests:
                    request.Cancel()
        self._under_way.clear()

    def move(self, tensors: Sequence[Tensor], peer: int, sending: bool) -> None:
        """Plain sends or receives, waited for."""
        post = self.communicator.Isend if sending else self.communicator.Irecv
        self._mpi.Request.Waitall([post(t.numpy(), peer, _HOST_TAGS) for t in tensors])

    def finalise(self) -> None:
        """End MPI in this process; mpirun expects it of every process."""
        self._mpi.Finalize()

    def _tag(self, channel: int) -> int:
        """Channels may be larger than tags; two in use at a time must not share one."""
        tag = channel % _HOST_TAGS
        others = self._channels[tag] - {channel}
        if others:
            raise TransportError(
                f"channels {channel} and {others.pop()} are in use at once and have the same MPI "
                f"tag; use channels that differ modulo {_HOST_TAGS}"
            )
        self._channels[tag].add(channel)
        return tag

    def _release(self, channel: int) -> None:
        if not any(message.channel == channel for _, message in self._under_way):
            self._channels[channel % _HOST_TAGS].discard(channel)


def load_mpi() -> Any:
    """The ``mpi4py.MPI`` module. Raises TransportError when there is none."""
    try:
        return importlib.import_module("mpi4py.MPI")
    except Exception as error:  # no bindings, or no MPI library behind them
        raise TransportError(
            f"MPI cannot be used: {type(error).__name__}: {error}; install mpi4py and an MPI, and "
            "start the processes with mpirun"
        ) from error


def under_mpirun() -> bool:
    """Whether Open MPI's mpirun started this process."""
    return "OMPI_COMM_WORLD_RANK" in os.environ
