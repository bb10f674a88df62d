"""What moving blocks costs on this machine: ``python -m ch15_helpers.disagg.measure``.

Two processes exchange blocks: of SmolLM2's shape over loopback, of Llama-3-8B's between two GPUs.
Plain sends of the same bytes are the baseline, interleaved with the transport; times are taken
inside the workers, start-up excluded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ch15_helpers.disagg.checksum import Checksum
from ch15_helpers.disagg.connect import (
    MEDIA,
    Joined,
    Medium,
    Place,
    connect,
    place_from_environment,
)
from ch15_helpers.disagg.leases import LeaseTable
from ch15_helpers.disagg.link import LinkFit, fit_link
from ch15_helpers.disagg.overlap import overlap_report
from ch15_helpers.disagg.pipeline import DisaggCluster
from ch15_helpers.disagg.pool import Part, RegisteredPool, refs_of
from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub, Wire
from ch15_helpers.errors import TransportError
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import LLAMA3_8B, SMOLLM2_135M
from ch15_helpers.serving.request import SamplingParams

_REQUEST_BLOCKS = 32  # 512 tokens
_PIECE = {"cpu": 4 * 1024**2, "cuda": 256 * 1024**2}  # of plain sends
_BLOCKS = {"nccl": 256}  # of a transfer: 512 MiB, a prompt of 4096 tokens of Llama-3-8B


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


@dataclass(frozen=True)
class HandoverCost:
    """Medians over the handovers of real ranks, one prompt at a time.

    Attributes:
        whole_s, layered_s: processor time of both ranks for control, a request; its bytes sent
            after the prompt, and under it.
        num_parts: of a layered handover.
        hidden_share: of the bytes' time, behind the prompt.
    """

    whole_s: float
    layered_s: float
    num_parts: float
    hidden_share: float


def handover_cost(
    spec: DisaggSpec | None = None, *, prompt_tokens: int = 256, num_requests: int = 8
) -> HandoverCost:
    """Start a prefill and a decode rank, and hand prompts over in both ways.

    Args:
        spec: what runs; None is SmolLM2 on one rank each.
    """
    prompts = [[1 + (7 * i + j) % 199 for j in range(prompt_tokens)] for i in range(num_requests)]
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with DisaggCluster.launch(spec or DisaggSpec()) as cluster:
        cluster.run(prompts[:2], params, max_open=1)  # both ranks are warm, and the link is known
        whole = cluster.run(prompts, params, overlap=False, max_open=1)
        layered = cluster.run(prompts, params, max_open=1)
    return HandoverCost(
        whole_s=median(each.orchestration_s for each in whole.handovers),
        layered_s=median(each.orchestration_s for each in layered.handovers),
        num_parts=median(each.num_parts for each in layered.handovers),
        hidden_share=overlap_report(whole, layered).hidden_share,
    )


def orchestration_s(num_blocks: int = _REQUEST_BLOCKS, rounds: int = 50) -> float:
    """Processor time of one request's handover, both ends together, without its bytes.

    Blocks of 64 bytes over the in-process wire: block tables, tags, windows, deadlines, reports.
    """
    cache = _tiny_cache(2 * num_blocks)
    hub = LocalHub(2)
    ends = [BlockTransport(hub.wire(rank), clock=time.perf_counter) for rank in range(2)]
    for end in ends:
        end.register(RegisteredPool(cache))
    times = []
    for number in range(rounds):
        began_s = time.process_time()
        receive = ends[1].receive(
            refs_of(range(num_blocks, 2 * num_blocks), number), source=0, channel=number
        )
        ends[0].send(refs_of(range(num_blocks), number), to=1, channel=number)
        ends[1].wait(receive)
        ends[0].poll()
        times.append(time.process_time() - began_s)
        if not receive.report.is_clean:
            raise TransportError(f"the blocks did not arrive: {receive.report}")
    return median(times)


def measure_transport(
    medium: Medium = "gloo",
    *,
    num_blocks: int | None = None,
    rounds: int = 9,
    timeout_s: float = 120.0,
) -> TransportTimes:
    """Start two processes and measure between them.

    Args:
        num_blocks: blocks of 16 tokens in a transfer: SmolLM2's of 737,280 bytes on CPUs, those of
            Llama-3-8B of 2 MiB on GPUs. None is 96, or 256 on GPUs.
        rounds: timed rounds, after two that are not.

    Raises:
        TransportError: a process failed or did not answer in time.
    """
    num_blocks = num_blocks or _BLOCKS.get(medium, 96)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        common = f"file://{Path(folder) / 'meet'}", num_blocks, rounds, theirs
        ranks = [
            context.Process(target=_rank_main, args=(medium, rank, *common), daemon=True)
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        try:
            if not ours.poll(timeout_s):
                raise TransportError(f"the processes did not answer within {timeout_s} s")
            answer = ours.recv()
        finally:
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()
    if isinstance(answer, str):
        raise TransportError(f"a process failed: {answer}")
    answer["samples"] = tuple(tuple(sample) for sample in answer["samples"])
    return TransportTimes(**answer)


def _rank_main(
    medium: Medium, rank: int, init: str, num_blocks: int, rounds: int, answers: Any
) -> None:
    """One process of ``measure_transport``."""
    torch.set_num_threads(1)
    try:
        joined = connect(medium, Place(rank, 2, init))
        times = run_rank(joined, num_blocks, rounds)
        if rank == 1:
            answers.send(asdict(times))
        joined.leave()
    except BaseException as error:
        answers.send(f"{type(error).__name__}: {error}")
        os._exit(1)


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
    small = _transport(wire, _tiny_cache(_REQUEST_BLOCKS, wire.device), True)
    channel = iter(range(2**31))
    leases = LeaseTable(time.perf_counter)
    num_layers = cache.pages.shape[1]
    cuts = [num_layers * i // 4 for i in range(5)]

    def move(
        transport: BlockTransport, count: int, layers: Sequence[tuple[int, int] | None] = (None,)
    ) -> Callable[[], None]:
        def run() -> None:
            refs, number = refs_of(range(count), 1), next(channel)
            heads = transport.pool.heads
            parts = [None if each is None else Part(each, heads) for each in layers]
            if sending:
                transfers = [transport.send(refs, to=1, channel=number, part=p) for p in parts]
            else:
                lease = leases.grant(number, range(count), 60.0)
                transfers = [
                    transport.receive(refs, source=0, channel=number, part=p, lease=lease)
                    for p in parts
                ]
            transport.wait(*transfers)
            if not sending:
                leases.release(lease)
            for transfer in transfers:
                if transfer.error or not (sending or transfer.report.is_clean):
                    raise TransportError(f"a transfer failed: {transfer.error} {transfer.report}")

        return run

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
        "layered": move(big[True], num_blocks, list(pairwise(cuts))),
        "checksum": digest,
        "small": move(small, _REQUEST_BLOCKS),
        **{count: move(big[True], count) for count in counts if count <= num_blocks},
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


def _tiny_cache(num_blocks: int, device: torch.device | str = "cpu") -> PagedKVCache:
    shape = replace(SMOLLM2_135M, num_hidden_layers=1, num_key_value_heads=1, head_dim=2)
    return PagedKVCache(shape, num_blocks, 4, device=device)


def main() -> None:
    """Measure between two processes: those of torchrun or mpirun, or two of our own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--medium", choices=MEDIA, default="gloo")
    parser.add_argument("--blocks", type=int, help="blocks of 16 tokens a transfer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--handovers", type=int, default=8, help="prompts for two ranks of our own; 0 starts none"
    )
    chosen = parser.parse_args()
    chosen.blocks = chosen.blocks or _BLOCKS.get(chosen.medium, 96)
    place = place_from_environment()
    if place is None:
        times = measure_transport(chosen.medium, num_blocks=chosen.blocks, rounds=chosen.rounds)
        report(chosen.medium, chosen.blocks, times)
        if chosen.handovers:
            report_handovers(handover_cost(num_requests=chosen.handovers))
        return
    if place.world_size != 2:
        parser.error(f"two processes are needed, {place.world_size} were started")
    torch.set_num_threads(1)
    try:
        joined = connect(chosen.medium, place)
        times = run_rank(joined, chosen.blocks, chosen.rounds)
        if place.rank == 1:
            report(chosen.medium, chosen.blocks, times)
        joined.leave()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # MPI's own exit would wait for the other process


def report(medium: str, num_blocks: int, times: TransportTimes) -> None:
    """Print what was measured."""
    print(f"medium                 {medium}, two processes")
    print(f"one transfer           {times.num_bytes / 1e6:.1f} MB in {num_blocks} blocks")
    print(f"plain send and recv    {times.plain_GBps:.2f} GB/s")
    print(f"transport, checked     {times.transport_GBps:.2f} GB/s ({times.fraction:.0%} of plain)")
    unchecked = f"{times.unverified_GBps:.2f} GB/s ({times.unverified_fraction:.0%} of plain)"
    print(f"transport, unchecked   {unchecked}")
    layered = times.layered_GBps / times.plain_GBps
    print(f"the same in 4 parts    {times.layered_GBps:.2f} GB/s ({layered:.0%} of plain)")
    print(f"checksum alone         {times.checksum_GBps:.2f} GB/s, once on each side")
    print(f"32 tiny blocks         {times.small_transfer_s * 1e3:.2f} ms from start to landed")
    print(f"orchestration          {orchestration_s() * 1e3:.2f} ms of processor time a transfer")
    try:
        fit: LinkFit = fit_link(times.samples)
    except ValueError as error:
        print(f"fitted link            none: {error}")
        return
    print(
        f"fitted link            {fit.link.latency_s * 1e6:.0f} us + bytes / "
        f"{fit.link.bandwidth_GBps:.2f} GB/s, median error {fit.median_error:.0%}"
    )


def report_handovers(cost: HandoverCost) -> None:
    """Print what control costs between real ranks."""
    hidden = f"{cost.num_parts:.0f} parts, {cost.hidden_share:.0%} of the bytes' time hidden"
    print(f"handover, whole        {cost.whole_s * 1e3:.2f} ms of orchestration a request")
    print(f"handover, layered      {cost.layered_s * 1e3:.2f} ms, {hidden}")


if __name__ == "__main__":
    main()
