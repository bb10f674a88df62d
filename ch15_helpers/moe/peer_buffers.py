"""All-to-all between the GPUs of one host by their copy engines, for messages of a fixed size.

A collective is a kernel: while it runs, some multiprocessors carry bytes and do not compute, and a
product that was cut for all of them needs a second round. Buffers that the peers can address
(torch's symmetric memory) are filled by copies instead, which take no multiprocessor. Two small
barriers enclose them: receivers are ready, everything has arrived.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.errors import MoEError

_RING = 8  # messages that may be on their way or still read; two batches need four


class PeerBuffers:
    """Receive buffers of all ranks, used in turn; one for all layers of a rank.

    Every rank of the group must make it, and start the same messages in the same order.
    """

    def __init__(self, message_bytes: int, device: torch.device, group: Any = None) -> None:
        """``message_bytes``: largest message from one rank to another."""
        from torch.distributed import _symmetric_memory as symmetric

        group = group or dist.group.WORLD
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._bytes, self._next = -(-message_bytes // 256) * 256, 0
        whole = _RING * self._size * self._bytes
        self._mine = symmetric.empty(whole, dtype=torch.uint8, device=device)
        self._handle: Any = symmetric.rendezvous(self._mine, group)
        self._theirs = [
            self._handle.get_buffer(peer, (whole,), torch.uint8) for peer in range(self._size)
        ]
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def start(self, rows: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Send the r-th part of [size * n, row_bytes] to rank r, and receive as much from each.

        Returns:
            What arrives, [size * n, row_bytes], which lives until some more messages have been
            started; and when it is there.

        Raises:
            MoEError: the messages are larger than the buffers.
        """
        size, step = rows.nbytes // self._size, self._bytes
        if size > step:
            raise MoEError(f"a message has {size} bytes, buffers are made for {step}")
        first, self._next = self._next * self._size * step, (self._next + 1) % _RING
        sent = rows.view(-1)
        self._stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self._stream):
            self._handle.barrier(channel=0)
            place = first + self._rank * size
            for turn in range(1, self._size + 1):  # everybody starts with the next rank
                peer = (self._rank + turn) % self._size
                there = self._theirs[peer][place : place + size]
                there.copy_(sent[peer * size : (peer + 1) * size], non_blocking=True)
            self._handle.barrier(channel=0)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return self._mine[first : first + rows.nbytes].view(rows.shape), done
