"""One rank's part of a measurement of the transport; see ``measure``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from statistics import median
from typing import Any

import torch

from ch15_helpers.disagg.checksum import Checksum
from ch15_helpers.disagg.connect import Joined
from ch15_helpers.disagg.leases import LeaseTable
from ch15_helpers.disagg.pool import Part, RegisteredPool, refs_of
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import Wire
from ch15_helpers.errors import TransportError
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import LLAMA3_8B, SMOLLM2_135M

REQUEST_BLOCKS = 32  # 512 tokens
_PIECE = {"cpu": 4 * 1024**2, "cuda": 256 * 1024**2}  # of plain sends


@dataclass(frozen=True)
class TransportTimes:
    """Medians over the rounds, measured on the receiving side.

    Attributes:
        num_bytes: of one transfer.
        plain_GBps: plain sends of as many bytes, in one piece or in pieces of 4 MiB (256 MiB
            between GPUs), whichever is faster.
        transport_GBps, unverified_GBps: the transport, with and without its checks.
        layered_GBps: the checked transport, a quarter of the layers after the other.
        checksum_GBps: digests alone, over blocks that are not in the processor's caches.
        small_transfer_s: 32 blocks of 64 bytes: latency, and nothing else.
        samples: (bytes, seconds) of transfers of various sizes, for ``fit_link``.
    """

    num_bytes: int
    plain_GBps: float
    transport_GBps: float
    unverified_GBps: float
    layered_GBps: float
    checksum_GBps: float
    small_transfer_s: float
    samples: tuple[tuple[int, float], ...]

    @property
    def fraction(self) -> float:
        """Bandwidth of the checked transport over that of plain sends."""
        return self.transport_GBps / self.plain_GBps

    @property
    def unverified_fraction(self) -> float:
        """The same without the checks."""
        return self.unverified_GBps / self.plain_GBps


class _Mover:
    """Moves blocks from rank 0 to rank 1, all of them or some, and insists that they arrive."""

    def __init__(self, sending: bool) -> None:
        self._sending = sending
        self._channel = count()
        self._leases = LeaseTable(time.perf_counter)

    def __call__(
        self, transport: BlockTransport, num_blocks: int, parts: Sequence[Part | None] = (None,)
    ) -> Callable[[], None]:
        """What one run does: a transfer for each part, all at once."""
        return partial(self._run, transport, num_blocks, parts)

    def _run(
        self, transport: BlockTransport, num_blocks: int, parts: Sequence[Part | None]
    ) -> None:
        refs, channel = refs_of(range(num_blocks), 1), next(self._channel)
        if self._sending:
            transfers = [transport.send(refs, to=1, channel=channel, part=part) for part in parts]
        else:
            lease = self._leases.grant(channel, range(num_blocks), 60.0)
            transfers = [
                transport.receive(refs, source=0, channel=channel, part=part, lease=lease)
                for part in parts
            ]
        transport.wait(*transfers)
        if not self._sending:
            self._leases.release(lease)
        for transfer in transfers:
            if transfer.error or not (self._sending or transfer.report.is_clean):
                raise TransportError(f"a transfer failed: {transfer.error} {transfer.report}")


def run_rank(joined: Joined, num_blocks: int, rounds: int) -> TransportTimes:
    """This rank's part of the measurement: rank 0 sends, rank 1 receives; both get times."""
    wire = joined.wire
    sending = wire.rank == 0
    cache = _cache_on(wire.device, num_blocks)
    cache.pages.fill_(1.0)
    flat = torch.ones(cache.nbytes, dtype=torch.uint8, device=wire.device)
    size = _PIECE[wire.device.type]
    pieces = [flat[start : start + size] for start in range(0, len(flat), size)]
    big = {True: _transport(wire, cache, True), False: _transport(wire, cache, False)}
    small = _transport(wire, tiny_cache(REQUEST_BLOCKS, wire.device), True)
    move, num_layers = _Mover(sending), cache.pages.shape[1]
    cuts = pairwise([num_layers * i // 4 for i in range(5)])
    quarters = [Part(layers, big[True].pool.heads) for layers in cuts]

    def digest() -> None:
        for row in [rows] if rows.is_cuda else [row[None] for row in rows]:
            checksum(row)

    counts = sorted({1, 2, 4, 8, 16, 32, num_blocks})
    rows = cache.content.view(num_blocks, -1).view(torch.uint8)
    checksum = Checksum(rows.shape[1] // 8, wire.device)
    versions: dict[Any, Callable[[], None]] = {
        "one": lambda: joined.move([flat], 1 - wire.rank, sending),
        "pieces": lambda: joined.move(pieces, 1 - wire.rank, sending),
        "checked": move(big[True], num_blocks),
        "unchecked": move(big[False], num_blocks),
        "layered": move(big[True], num_blocks, quarters),
        "checksum": digest,
        "small": move(small, REQUEST_BLOCKS),
        **{n: move(big[True], n) for n in counts if n <= num_blocks},
    }
    seconds = _interleave(versions, rounds, joined.barrier, wire.device)
    return TransportTimes(
        num_bytes=cache.nbytes,
        plain_GBps=cache.nbytes / min(seconds["one"], seconds["pieces"]) / 1e9,
        transport_GBps=cache.nbytes / seconds["checked"] / 1e9,
        unverified_GBps=cache.nbytes / seconds["unchecked"] / 1e9,
        layered_GBps=cache.nbytes / seconds["layered"] / 1e9,
        checksum_GBps=cache.nbytes / seconds["checksum"] / 1e9,
        small_transfer_s=seconds["small"],
        samples=tuple((n * cache.block_bytes, s) for n, s in seconds.items() if isinstance(n, int)),
    )


def _interleave(
    versions: dict[Any, Callable[[], None]],
    rounds: int,
    barrier: Callable[[], None],
    device: torch.device,
) -> dict[Any, float]:
    """Median seconds of each version, from when both ranks are ready until all is in place."""
    times: dict[Any, list[float]] = {name: [] for name in versions}
    for round_ in range(-2, rounds):
        for name, run in versions.items():
            barrier()
            began_s = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 0:
                times[name].append(time.perf_counter() - began_s)
    return {name: median(values) for name, values in times.items()}


def _transport(wire: Wire, cache: PagedKVCache, verify: bool) -> BlockTransport:
    transport = BlockTransport(wire, clock=time.perf_counter, verify=verify)
    transport.register(RegisteredPool(cache))
    return transport


def _cache_on(device: torch.device, num_blocks: int) -> PagedKVCache:
    """Blocks of 16 tokens: SmolLM2's on a CPU, those of Llama-3-8B on a GPU."""
    if device.type == "cpu":
        return PagedKVCache(SMOLLM2_135M, num_blocks, 16)
    return PagedKVCache(LLAMA3_8B, num_blocks, 16, dtype=torch.bfloat16, device=device)


def tiny_cache(num_blocks: int, device: torch.device | str = "cpu") -> PagedKVCache:
    """Blocks of 64 bytes: whatever takes time then is not their bytes."""
    shape = replace(SMOLLM2_135M, num_hidden_layers=1, num_key_value_heads=1, head_dim=2)
    return PagedKVCache(shape, num_blocks, 4, device=device)
