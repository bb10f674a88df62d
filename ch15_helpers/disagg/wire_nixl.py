"""Messages over NIXL, NVIDIA's transfer library for inference, with its UCX backend.

The receiver reads: a sender announces where a message lies, the receiver fetches it with a
one-sided READ into a buffer of its own, and the library tells the sender that this is over. Buffers
come from one region that is registered at the start, so that its metadata is exchanged once.

The library is optional (see the ``nixl`` extra). It can crash at interpreter exit on machines
without its companions: processes that use it should leave with ``os._exit``.
"""

from __future__ import annotations

import importlib
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.disagg.wire import NoBufferNow, WireMessage
from ch15_helpers.errors import TransportError

_ANNOUNCE = struct.Struct("<cqqqq")  # b"A", channel, number of the send, address, bytes
_DONE = struct.Struct("<cq")  # b"D", number of the send
_POLL_S = 1e-4


class NixlWire:
    """One rank's end; all ranks must be there when it is made."""

    window = 4
    in_order = False
    zero_copy = False  # what is read must be registered

    def __init__(
        self,
        rank: int,
        world_size: int,
        exchange: Callable[[bytes], Sequence[bytes]],
        *,
        staging_bytes: int = 128 * 1024**2,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start an agent and make it known to the others.

        Args:
            exchange: gives all ranks' bytes, in order of rank, for this rank's bytes.
            staging_bytes: memory for messages under way, registered with the library.
            device: where the staging memory is.

        Raises:
            TransportError: the library is not installed or does not start.
        """
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self._agent = _make_agent(f"rank-{rank}")
        self._staging = torch.zeros(staging_bytes, dtype=torch.uint8, device=self.device)
        self._num_used = 0
        self._region = self._agent.register_memory(self._staging)
        metadata = exchange(self._agent.get_agent_metadata())
        self._names = [f"rank-{peer}" for peer in range(world_size)]
        for peer, data in enumerate(metadata):
            if peer != rank:
                self._agent.add_remote_agent(data)
        self._num_sends = 0
        self._sends: dict[int, WireMessage] = {}
        self._announced: dict[tuple[int, int], deque[tuple[int, int, int]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[WireMessage]] = defaultdict(deque)
        self._reads: list[tuple[Any, WireMessage]] = []
        self._done: list[tuple[WireMessage, str | None]] = []
        self._pause = threading.Event()

    def new_buffer(self, num_bytes: int) -> Tensor:
        """Registered memory. Raises NoBufferNow when ``staging_bytes`` are used up."""
        start = self._num_used
        end = start + -(-num_bytes // 64) * 64
        if end > len(self._staging):
            raise NoBufferNow(
                f"messages under way need more than the {len(self._staging)} bytes of staging "
                "memory; raise staging_bytes or lower max_message_bytes"
            )
        self._num_used = end
        return self._staging[start : start + num_bytes]

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            if message.sending:
                message.seal()
                number, buffer = self._num_sends, message.buffer
                self._num_sends += 1
                self._sends[number] = message
                text = _ANNOUNCE.pack(b"A", message.channel, number, buffer.data_ptr(), len(buffer))
                try:
                    self._agent.send_notif(self._names[message.peer], text)
                except Exception as error:  # the library's own types are not public
                    del self._sends[number]
                    self._done.append((message, f"{type(error).__name__}: {error}"))
            else:
                self._receives[message.peer, message.channel].append(message)

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        for name, texts in self._agent.get_new_notifs().items():
            peer = self._names.index(name if isinstance(name, str) else name.decode())
            for text in texts:
                self._hear(peer, text)
        for key in [key for key, queue in self._receives.items() if queue]:
            while self._receives[key] and self._announced[key]:
                self._read(self._receives[key].popleft(), *self._announced[key].popleft())
        under_way = []
        for handle, message in self._reads:
            state = self._agent.check_xfer_state(handle)
            if state == "PROC":
                under_way.append((handle, message))
                continue
            self._agent.release_xfer_handle(handle)
            self._done.append((message, None if state == "DONE" else f"NIXL reports {state}"))
        self._reads = under_way
        done, self._done = self._done, []
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        # The library has no way to wait for it: the transport looks again after a short pause.
        self._pause.wait(min(timeout_s, _POLL_S))

    def close(self) -> None:
        for handle, _ in self._reads:
            self._agent.release_xfer_handle(handle)
        self._reads.clear()
        for peer, name in enumerate(self._names):
            if peer != self.rank:
                self._agent.remove_remote_agent(name)
        self._agent.deregister_memory(self._region)

    def _hear(self, peer: int, text: bytes) -> None:
        if text[:1] == b"A":
            _, channel, number, address, num_bytes = _ANNOUNCE.unpack(text)
            self._announced[peer, channel].append((number, address, num_bytes))
        else:
            message = self._sends.pop(_DONE.unpack(text)[1], None)
            if message is not None:
                self._done.append((message, None))

    def _read(self, message: WireMessage, number: int, address: int, num_bytes: int) -> None:
        buffer = message.buffer
        if num_bytes != len(buffer):
            error = f"{num_bytes} bytes were sent, {len(buffer)} were expected"
            self._done.append((message, error))
            return
        kind = "VRAM" if buffer.is_cuda else "DRAM"
        device_id = buffer.device.index or 0
        local = self._agent.get_xfer_descs([(buffer.data_ptr(), num_bytes, device_id)], kind)
        remote = self._agent.get_xfer_descs([(address, num_bytes, device_id)], kind)
        handle = self._agent.initialize_xfer(
            "READ", local, remote, self._names[message.peer], _DONE.pack(b"D", number)
        )
        self._agent.transfer(handle)
        self._reads.append((handle, message))


def why_no_nixl() -> str | None:
    """Why NIXL cannot be used here, or None when it can be imported."""
    try:
        importlib.import_module("nixl._api")
    except Exception as error:  # a missing shared library raises all kinds of errors
        return f"NIXL cannot be imported: {type(error).__name__}: {error}"
    return None


def _make_agent(name: str) -> Any:
    reason = why_no_nixl()
    if reason is not None:
        raise TransportError(f"{reason}; install the nixl extra with pip install --no-deps")
    api = importlib.import_module("nixl._api")
    try:
        return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    except Exception as error:
        raise TransportError(f"NIXL does not start: {type(error).__name__}: {error}") from error
