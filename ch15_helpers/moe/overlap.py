"""Work while tokens travel: a shared expert, a second micro-batch, or the next chunk.

A layer is written once, as a generator that stops where it would only wait. Whoever drives some
of them in turn has two-batch overlap (DeepSeek-V3, 2024); running one to its end and then the next
is the sequential version. The operations are the same, so the results are.

On CUDA the collectives of NCCL have their own stream: what is launched between the start of one
and its wait runs beside it, and the wait holds up the stream and not the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.dispatch import Trip
from ch15_helpers.moe.expert_parallel import ExpertParallel
from ch15_helpers.moe.experts import SharedExpert

Result = TypeVar("Result")
Steps = Generator[None, None, Tensor]
"""Stops after each start of a collective; returns the layer's result [N, hidden]."""


def moe_steps(
    parallel: ExpertParallel,
    x: Tensor,
    trip: Trip,
    shared: SharedExpert | None = None,
) -> Steps:
    """One MoE block. The shared expert runs while tokens travel: two thirds out, one third back.

    Args:
        x: [N, hidden]. trip: of its routing, from ``parallel.plan``.
    """
    arrived = parallel.start_dispatch(x, trip)
    inner = shared.first(x) if shared is not None else None
    yield
    results = parallel.compute(arrived, x.dtype)
    returned = parallel.start_combine(results, trip)
    y = shared.second(inner) if shared is not None and inner is not None else None
    yield
    out = parallel.finish(returned, trip, x.dtype)
    return out if y is None else out + y


def run_in_turn(batches: Sequence[Steps]) -> list[Tensor]:
    """Drive all at once: while one waits for its tokens, the next one works."""
    results: dict[int, Tensor] = {}
    while len(results) < len(batches):
        for index, steps in enumerate(batches):
            if index not in results:
                _advance(index, steps, results)
    return [results[index] for index in range(len(batches))]


def run_one_by_one(batches: Sequence[Steps]) -> list[Tensor]:
    """Drive each to its end before the next one starts."""
    results: dict[int, Tensor] = {}
    for index, steps in enumerate(batches):
        while index not in results:
            _advance(index, steps, results)
    return [results[index] for index in range(len(batches))]


def _advance(index: int, steps: Steps, results: dict[int, Tensor]) -> None:
    try:
        next(steps)
    except StopIteration as end:
        results[index] = end.value


def forward_sequential(
    parallel: ExpertParallel,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    shared: SharedExpert | None = None,
) -> Tensor:
    """The block with every phase waited for, and the shared expert after them."""
    out = parallel(x, weights, experts)
    return out if shared is None else out + shared(x)


def forward_overlapped(
    parallel: ExpertParallel,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    shared: SharedExpert | None = None,
    num_chunks: int = 1,
) -> Tensor:
    """The block with the shared expert, and more chunks where asked for, beside the transfers.

    Args:
        x: [N, hidden]. weights, experts: [N, top_k].
        num_chunks: parts of nearly equal size, the same number on every rank; counts of all are
            agreed on in one message. A chunk may be empty.
    """
    if num_chunks < 1:
        raise MoEError(f"num_chunks is {num_chunks}; expected 1 or more")
    parts = [t.tensor_split(num_chunks) for t in (x, weights, experts)]
    trips = parallel.plan(list(zip(parts[1], parts[2], strict=True)))
    steps = [
        moe_steps(parallel, chunk, trip, shared)
        for chunk, trip in zip(parts[0], trips, strict=True)
    ]
    return torch.cat(run_in_turn(steps))


@dataclass(frozen=True)
class OverlapLayer:
    """A layer in pieces.

    Attributes:
        before: residual stream [N, hidden] to (residual, x, weights, experts): attention, norm and
            router. The block's result is added to that residual.
        parallel, shared: its experts.
    """

    before: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    parallel: ExpertParallel
    shared: SharedExpert | None = None


def layer_steps(layers: Sequence[OverlapLayer], residual: Tensor) -> Steps:
    """All layers for one micro-batch [N, hidden], stopping where it would wait."""
    for layer in layers:
        residual, x, weights, experts = layer.before(residual)
        (trip,) = layer.parallel.plan([(weights, experts)])
        residual = residual + (yield from moe_steps(layer.parallel, x, trip, layer.shared))
    return residual


def forward_micro_batches(
    layers: Sequence[OverlapLayer], batches: Sequence[Tensor], *, overlap: bool = True
) -> list[Tensor]:
    """Some layers over micro-batches [N, hidden], in turn (two of them: two-batch overlap) or not.

    Every rank must bring as many micro-batches; they may be empty.
    """
    steps = [layer_steps(layers, batch) for batch in batches]
    return (run_in_turn if overlap else run_one_by_one)(steps)


def time_versions(
    versions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    iterations: int = 5,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each version in each round, the longest of all ranks; A B A B.

    Every rank of the default group must call it with the same versions. Starts are aligned by a
    barrier, which is outside the time.
    """
    if iterations < 1 or warmup < 0:
        raise MoEError(f"iterations {iterations}, warmup {warmup}; expected ≥ 1 and ≥ 0")
    times: dict[str, list[float]] = {name: [] for name in versions}
    for round_ in range(-warmup, iterations):
        for name, run in versions.items():
            _, elapsed_s = timed_together(run, device)
            if round_ >= 0:
                times[name].append(elapsed_s)
    flat = [seconds for samples in times.values() for seconds in samples]
    longest = torch.tensor(flat, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    values = longest.tolist()
    return {name: values[i * iterations : (i + 1) * iterations] for i, name in enumerate(versions)}


def timed_together(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """A run's result, and its seconds on this rank; all ranks start together, so all must call."""
    if device.type == "cuda":
        return _timed_on_gpus(run, device)
    dist.barrier()
    start_s = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start_s


def _timed_on_gpus(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """By the GPU's clock, from the moment in which the last of them is there."""
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    flag = torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    dist.all_reduce(flag)
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3
