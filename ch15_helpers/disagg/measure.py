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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ch15_helpers.disagg.connect import (
    MEDIA,
    Medium,
    Place,
    connect,
    place_from_environment,
)
from ch15_helpers.disagg.link import LinkFit, fit_link
from ch15_helpers.disagg.measure_rank import (
    REQUEST_BLOCKS,
    TransportTimes,
    run_rank,
    tiny_cache,
)
from ch15_helpers.disagg.overlap import overlap_report
from ch15_helpers.disagg.pipeline import DisaggCluster
from ch15_helpers.disagg.pool import RegisteredPool, refs_of
from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub
from ch15_helpers.errors import TransportError
from ch15_helpers.serving.request import SamplingParams

_BLOCKS = {"nccl": 512}  # of a transfer: 1 GiB, a prompt of 8192 tokens of Llama-3-8B


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


def orchestration_s(num_blocks: int = REQUEST_BLOCKS, rounds: int = 50) -> float:
    """Processor time of one request's handover, both ends together, without its bytes.

    Blocks of 64 bytes over the in-process wire: block tables, tags, windows, deadlines, reports.
    """
    cache = tiny_cache(2 * num_blocks)
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
            Llama-3-8B of 2 MiB on GPUs. None is 96, or 512 on GPUs.
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
