"""Joins processes: finds out who they are, and opens a wire between them.

Processes come from ``torchrun`` (one node or many), from ``mpirun``, or from our own tests, which
say who they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.disagg.wire import Wire
from ch15_helpers.disagg.wire_collective import GlooWire
from ch15_helpers.disagg.wire_mpi import MpiWire, under_mpirun
from ch15_helpers.disagg.wire_nccl import NcclWire
from ch15_helpers.disagg.wire_nixl import NixlWire
from ch15_helpers.errors import TransportError

Medium = Literal["gloo", "nccl", "nixl", "mpi"]
MEDIA: tuple[Medium, ...] = ("gloo", "nccl", "nixl", "mpi")


@dataclass(frozen=True)
class Place:
    """Where a process stands.

    Attributes:
        init_method: how torch.distributed finds the others.
        store: (host, port) of a TCPStore that somebody else keeps; used instead where given. It
            outlives every rank.
        local_rank: place among the ranks of this host, which is the number of its GPU; None is the
            rank.
    """

    rank: int
    world_size: int
    init_method: str = "env://"
    store: tuple[str, int] | None = None
    local_rank: int | None = None


def place_from_environment() -> Place | None:
    """What torchrun or mpirun says, or None when neither started this process."""
    environment = os.environ
    if under_mpirun():
        return Place(
            int(environment["OMPI_COMM_WORLD_RANK"]), int(environment["OMPI_COMM_WORLD_SIZE"])
        )
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local = environment.get("LOCAL_RANK", environment["RANK"])
        return Place(
            int(environment["RANK"]), int(environment["WORLD_SIZE"]), local_rank=int(local)
        )
    return None


@dataclass(frozen=True)
class Joined:
    """A process that has met the others.

    Attributes:
        wire: for a BlockTransport.
        barrier: waits until all ranks are there.
        move: (tensors, peer, sending) plainly: all are started, then waited for. What a transport
            is measured against.
    """

    wire: Wire
    barrier: Callable[[], None]
    move: Callable[[Sequence[Tensor], int, bool], None]

    def leave(self) -> None:
        """Wait for the others and end the process, without the interpreter's own exit.

        NIXL may crash in that, and threads that wait for a peer would abort it.
        """
        self.barrier()
        if isinstance(self.wire, MpiWire):
            self.wire.finalise()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def connect(
    medium: Medium,
    place: Place,
    timeout_s: float = 60.0,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> Joined:
    """Meet the other ranks. Every rank must call it.

    Args:
        timeout_s: how long to wait for the others (not for MPI, which mpirun has joined already).
        pairs: (source, target) of the directions that are needed, the same on every rank; NCCL
            opens these and no others. None is all.

    Raises:
        ValueError: no such medium.
        TransportError: its library is missing, or a rank has no GPU of its own.
    """
    if medium not in MEDIA:
        raise ValueError(f"medium must be one of {', '.join(MEDIA)}, got {medium!r}")
    if medium == "mpi":
        wire = MpiWire()
        return Joined(
            wire,
            wire.communicator.Barrier,
            wire.move,
        )
    if medium == "nccl":
        _take_gpu(place)
    options: dict[str, Any] = {}
    if place.store is not None:
        options["store"] = dist.TCPStore(*place.store, is_master=False)  # type: ignore[attr-defined]
    else:
        options["init_method"] = place.init_method
    # Over gloo also where blocks travel over NCCL: who meets and waits needs no GPU for that.
    dist.init_process_group(
        "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_s),
        **options,
    )
    if medium != "nccl":
        return Joined(_open(medium, place), dist.barrier, _move)
    store = dist.distributed_c10d._get_default_store()
    nccl = NcclWire(place.rank, place.world_size, store, pairs, timeout_s)
    return Joined(nccl, dist.barrier, nccl.move)


def _take_gpu(place: Place) -> None:
    """One GPU for each rank of this host."""
    count = torch.cuda.device_count()
    local = place.rank if place.local_rank is None else place.local_rank
    if not 0 <= local < count:
        raise TransportError(
            f"rank {place.rank} needs a GPU of its own for NCCL, and this host has {count}; start "
            "fewer ranks, or use gloo"
        )
    torch.cuda.set_device(local)


def _move(tensors: Sequence[Tensor], peer: int, sending: bool) -> None:
    post = dist.isend if sending else dist.irecv
    for work in [post(tensor, peer) for tensor in tensors]:
        if work is not None:  # None: this rank is not in the group
            work.wait()


def _open(medium: Medium, place: Place) -> Wire:
    if medium == "gloo":
        return GlooWire()
    return NixlWire(place.rank, place.world_size, all_gather_bytes)


def all_gather_bytes(data: bytes) -> Sequence[bytes]:
    """Bytes of all ranks of the default group, in order, for the bytes of this one."""
    world_size = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    mine = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = [torch.zeros_like(mine) for _ in range(world_size)]
    dist.all_gather(rows, mine)
    return [bytes(row[: int(size)].tolist()) for row, size in zip(rows, sizes, strict=True)]
