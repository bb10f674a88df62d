"""The process that owns a peer pool: ``python -m ch15_helpers.kv.peer_main PORT [DEVICE]``.

It is as dumb as memory: it copies rows in and out of numbered slots, as one-sided transfers would,
and knows nothing of keys. Memory of a GPU it only lends: the other process maps it (CUDA IPC) and
reads and writes it without a word. Started by ``tier_peer.PeerProcess``; ends with it.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

OPEN, PUT, GET, STOP, LEND = 1, 2, 3, 4, 5
MOST = 64
"""Most blocks in one message."""
ORDER_LEN = 4 + MOST
"""An order is int64: action, count, slots (OPEN), bytes of a row (OPEN), then slot numbers."""
HANDLE_LEN = 1024
"""Bytes of the answer to LEND: JSON, and zeros behind it."""
CLIENT, SERVER = 0, 1
_IDLE = timedelta(days=1)  # a client that has ended closes the connection, which is noticed at once


def make_store(port: int, *, master: bool) -> Any:
    """The store through which the two find each other; port 0 takes a free one."""
    kind: Any = dist.TCPStore  # type: ignore[attr-defined]
    return kind("127.0.0.1", port, 2, is_master=master, wait_for_workers=False)


def connect(store: Any, rank: int, timeout: timedelta) -> Any:
    """A gloo group of the two processes, apart from torch's default group."""
    gloo: Any = dist.ProcessGroupGloo  # its stub lacks send and recv
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return gloo(store, rank, 2, options)


def lend(num_slots: int, row_bytes: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed rows on a GPU, and the message with which another process maps them."""
    rows = torch.zeros((num_slots, row_bytes), dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    storage: Any = rows.untyped_storage()
    fields = storage._share_cuda_()
    text = json.dumps([f.hex() if isinstance(f, bytes) else f for f in fields]).encode()
    message = torch.zeros(HANDLE_LEN, dtype=torch.uint8)
    message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return rows, message


def borrow(
    message: torch.Tensor, num_slots: int, row_bytes: int, onto: torch.device
) -> torch.Tensor:
    """In the other process: the rows that ``lend`` made, uint8 [slots, row bytes].

    They are mapped for kernels of ``onto``, so torch takes them for memory of that device.
    """
    text = bytes(message.tolist()).rstrip(b"\0")
    fields = [bytes.fromhex(f) if isinstance(f, str) else f for f in json.loads(text)]
    index = torch.cuda.current_device() if onto.index is None else onto.index
    storage = torch.UntypedStorage._new_shared_cuda(index, *fields[1:])
    rows = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return rows.set_(storage, 0, (num_slots, row_bytes), (row_bytes, 1))


def serve(port: int, device: str = "") -> None:
    """Answer orders until STOP, or until the client is gone."""
    torch.set_num_threads(1)
    store = make_store(port, master=False)
    group = connect(store, SERVER, _IDLE)
    order = torch.zeros(ORDER_LEN, dtype=torch.int64)
    rows = lent = torch.zeros((0, 0), dtype=torch.uint8)
    try:
        while True:
            group.recv([order], CLIENT, 0).wait()
            action, count, num_slots, row_bytes = order[:4].tolist()
            slots = order[4 : 4 + count]
            if action == STOP:
                return
            if action == GET:
                group.send([rows[slots]], CLIENT, 0).wait()
                continue
            if action == LEND:
                del lent  # before the new ones: both might not fit
                lent, message = lend(num_slots, row_bytes, device)
                group.send([message], CLIENT, 0).wait()
                continue
            if action == OPEN:
                rows = torch.zeros((num_slots, row_bytes), dtype=torch.uint8)
            else:
                data = torch.empty((count, rows.shape[1]), dtype=torch.uint8)
                group.recv([data], CLIENT, 0).wait()
                rows[slots] = data
            group.send([order[:1]], CLIENT, 0).wait()
    except RuntimeError:
        return  # the client has gone without a word


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[2:])
