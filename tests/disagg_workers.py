"""Ranks of real processes for the transport tests; what they find out goes into a queue."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from ch15_helpers.disagg.connect import Place, connect
from ch15_helpers.disagg.fabric import Fabric, FabricWire
from ch15_helpers.disagg.faults import FaultyWire
from ch15_helpers.disagg.heads import head_routes, heads_of
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.pool import Part, RegisteredPool, refs_of
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import TINY

BLOCKS = 40
ORDER = [(7 * i + 3) % BLOCKS for i in range(BLOCKS)]


def content(rank: int) -> torch.Tensor:
    """What the pool of a rank holds at first: known to every rank."""
    generator = torch.Generator().manual_seed(rank)
    shape = (BLOCKS, TINY.num_hidden_layers, 2, 4, TINY.num_key_value_heads, TINY.head_dim)
    return torch.rand(shape, generator=generator)


def main(medium: Any, rank: int, world_size: int, init_method: str, job: str, results: Any) -> None:
    """Run one rank's part of a job. Leaves without interpreter exit, as NIXL asks for."""
    torch.set_num_threads(1)
    try:
        wire = connect(medium, Place(rank, world_size, init_method)).wire
        results.put((rank, JOBS[job](wire, rank)))
        if job not in DEADLY:
            dist.barrier()  # nobody's connections go before everybody is ready
    except BaseException as error:
        results.put((rank, error_text(error)))
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)


def error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def new_transport(wire: Any, rank: int, **options: Any) -> tuple[BlockTransport, PagedKVCache]:
    cache = PagedKVCache(TINY, BLOCKS, 4, device=wire.device)
    cache.pages.copy_(content(rank))
    options.setdefault("max_message_bytes", 5 * (cache.block_bytes + 48))
    transport = BlockTransport(wire, clock=time.perf_counter, **options)
    transport.register(RegisteredPool(cache))
    return transport, cache


def tour(wire: Any, rank: int) -> dict[str, Any]:
    """Two ranks: both directions at once, faults, a deadline, a cancelled send, then more."""
    found: dict[str, Any] = {}
    transport, cache = new_transport(wire, rank)
    peer = 1 - rank
    half = BLOCKS // 2
    send = transport.send(refs_of(ORDER[:half], rank), to=peer, channel=1)
    receive = transport.receive(refs_of(ORDER[half:], peer), source=peer, channel=1)
    transport.wait(send, receive)
    theirs = content(peer)
    found["clean"] = receive.report.is_clean
    found["equal"] = torch.equal(cache.pages[ORDER[half:]].cpu(), theirs[ORDER[:half]])
    found["kept"] = torch.equal(cache.pages[ORDER[:half]].cpu(), content(rank)[ORDER[:half]])
    dist.barrier()
    # Channels may be waited for in another order than they were sent in, where there are any.
    order = range(6) if wire.in_order else range(5, -1, -1)
    if rank == 0:
        transfers = [transport.send(refs_of([c], c), to=1, channel=10 + c) for c in range(6)]
    else:
        transfers = [transport.receive(refs_of([c], c), source=0, channel=10 + c) for c in order]
    transport.wait(*transfers)
    found["channels"] = all(t.report.is_clean for t in transfers)
    dist.barrier()
    # A deadline passes; the data comes later and is dropped, and the connection still works.
    if rank == 1:
        late = transport.receive(refs_of([0, 1], 5), source=0, channel=30, timeout_s=0.05)
        transport.wait(late)
        found["expired"] = late.state.value
        cache.pages[[0, 1]] = 42.0
    dist.barrier()
    if rank == 0:
        transport.wait(transport.send(refs_of([0, 1], 5), to=1, channel=30))
    after = (
        transport.send(refs_of([7], 6), to=1, channel=31)
        if rank == 0
        else transport.receive(refs_of([8], 6), source=0, channel=31)
    )
    transport.wait(after)
    dist.barrier()
    if rank == 1:
        transport.poll()
        found["untouched"] = bool((cache.pages[[0, 1]] == 42.0).all())
        found["late"] = transport.num_late
        found["after"] = after.report.is_clean
    return found


def damaged(wire: Any, rank: int) -> dict[str, Any]:
    """Two ranks: a block is corrupted under way."""
    outer = FaultyWire(wire, "corrupt", row=2) if rank == 0 else wire
    transport, _ = new_transport(outer, rank)
    if rank == 0:
        transport.wait(transport.send(refs_of(ORDER, 1), to=1, channel=1))
        return {}
    receive = transport.receive(refs_of(ORDER, 1), source=0, channel=1)
    transport.wait(receive)
    return {"recompute": receive.to_recompute, "state": receive.state.value}


def split_heads(wire: Any, rank: int) -> dict[str, Any]:
    """Four ranks: 2 prefill ranks with one KV head each, 1 decode rank; then 1 to 2."""
    from dataclasses import replace

    total, layers = TINY.num_key_value_heads, (0, TINY.num_hidden_layers)
    found: dict[str, Any] = {}
    for channel, (sources, targets) in enumerate([([0, 1], [2]), ([0], [2, 3])], start=1):
        everyone = sources if rank in sources else targets if rank in targets else []
        if not everyone:
            continue
        low, high = heads_of(everyone.index(rank), len(everyone), total)
        cache = PagedKVCache(replace(TINY, num_key_value_heads=high - low), BLOCKS, 4)
        if rank in sources:
            cache.pages.copy_(content(0)[:, :, :, :, low:high])
        transport = BlockTransport(wire, clock=time.perf_counter)
        transport.register(RegisteredPool(cache, first_head=low))
        transfers = []
        for route in head_routes(total, len(sources), len(targets)):
            part = Part(layers, route.heads)
            source, target = sources[route.source], targets[route.target]
            if rank == source:
                transfers.append(
                    transport.send(refs_of(ORDER, 1), to=target, channel=channel, part=part)
                )
            if rank == target:
                transfers.append(
                    transport.receive(
                        refs_of(ORDER[::-1], 1), source=source, channel=channel, part=part
                    )
                )
        transport.wait(*transfers)
        if rank in targets:
            expected = content(0)[ORDER][:, :, :, :, low:high]
            found[f"{len(sources)}to{len(targets)}"] = torch.equal(
                cache.pages[ORDER[::-1]], expected
            )
    return found


def dying(wire: Any, rank: int) -> dict[str, Any]:
    """Two ranks: the sender dies in the middle; the receiver gets an error or its deadline."""
    transport, _ = new_transport(wire, rank)
    if rank == 0:
        os._exit(0)
    receive = transport.receive(refs_of(ORDER, 1), source=0, channel=1, timeout_s=5.0)
    transport.wait(receive)
    return {"state": receive.state.value, "missing": len(receive.report.missing)}


def orphaned(wire: Any, rank: int) -> dict[str, Any]:
    """Two ranks over NCCL: rank 0 dies, which NCCL does not notice; rank 1 is told, and goes on."""
    transport, cache = new_transport(wire, rank)
    exchange = [
        transport.send(refs_of(ORDER[:4], rank), to=1 - rank, channel=1),
        transport.receive(refs_of(ORDER[4:8], 1 - rank), source=1 - rank, channel=1),
    ]
    transport.wait(*exchange)
    dist.barrier()
    if rank == 0:
        os._exit(0)
    refs = refs_of(ORDER, 1)
    both = [
        transport.send(refs, to=0, channel=2, timeout_s=30.0),
        transport.receive(refs, source=0, channel=2, timeout_s=30.0),
    ]
    until_s = time.perf_counter() + 0.5
    while time.perf_counter() < until_s:
        transport.poll()
    waited = [transfer.state.value for transfer in both]
    wire.lose(0, "rank 0 is gone")
    transport.wait(*both)
    torch.cuda.synchronize()
    refused = transport.send(refs, to=0, channel=3)
    transport.wait(refused)
    return {
        "before": [transfer.report.is_clean for transfer in exchange[1:]],
        "waited": waited,
        "after": [transfer.state.value for transfer in (*both, refused)],
        "reason": {transfer.error for transfer in (*both, refused)},
        "pool": bool(torch.isfinite(cache.pages).all()),
    }


def simulated(wire: Any, rank: int) -> dict[str, Any]:
    """Two ranks: a modelled network on the real clock, around the real wire."""
    fabric = Fabric(LinkModel(latency_s=0.3, bandwidth_GBps=1.0), time.perf_counter)
    transport, cache = new_transport(FabricWire(wire, fabric), rank)
    dist.barrier()
    began_s = time.perf_counter()
    if rank == 0:
        transport.wait(transport.send(refs_of(ORDER, 1), to=1, channel=1))
        return {"kind": fabric.kind, "messages": len(fabric.deliveries)}
    receive = transport.receive(refs_of(ORDER[::-1], 1), source=0, channel=1)
    transport.wait(receive)
    return {
        "waited": time.perf_counter() - began_s >= 0.3,
        "clean": receive.report.is_clean,
        "equal": torch.equal(cache.pages[ORDER[::-1]], content(0)[ORDER]),
    }


DEADLY = ("dying", "orphaned")  # rank 0 does not survive these
JOBS = {
    "simulated": simulated,
    "tour": tour,
    "damaged": damaged,
    "split_heads": split_heads,
    "dying": dying,
    "orphaned": orphaned,
}
