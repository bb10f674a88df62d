"""Joins processes: a store to meet at, and the wires that are made through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from ch15_helpers.disagg.wire import Wire
from ch15_helpers.disagg.wire_collective import GlooWire, NcclWire
from ch15_helpers.disagg.wire_nixl import NixlWire

Medium = Literal["gloo", "nccl", "nixl"]


def connect(
    medium: Medium, rank: int, world_size: int, init_method: str = "env://", timeout_s: float = 60.0
) -> Wire:
    """Meet the other ranks and open a wire to them. Every rank must call it.

    Args:
        init_method: as of ``torch.distributed``; ``env://`` is what torchrun prepares.
        timeout_s: how long to wait for the others.

    Raises:
        ValueError: no such medium.
        TransportError: its library is missing.
    """
    if medium not in ("gloo", "nccl", "nixl"):
        raise ValueError(f"medium must be gloo, nccl or nixl, got {medium!r}")
    options: dict[str, Any] = {}
    if medium == "nccl":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group(
        "nccl" if medium == "nccl" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        **options,
    )
    if medium == "gloo":
        return GlooWire()
    if medium == "nccl":
        return NcclWire()
    return NixlWire(rank, world_size, all_gather_bytes())


def all_gather_bytes() -> Callable[[bytes], Sequence[bytes]]:
    """An exchange over the default group: bytes of this rank to the bytes of all."""

    def exchange(data: bytes) -> Sequence[bytes]:
        world_size = dist.get_world_size()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        all_data = [torch.zeros_like(mine) for _ in range(world_size)]
        dist.all_gather(all_data, mine)
        return [bytes(row[: int(size)].tolist()) for row, size in zip(all_data, sizes, strict=True)]

    return exchange
