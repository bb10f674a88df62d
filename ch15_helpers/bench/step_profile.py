"""Where the time of one step goes: what ran, for how long, and the gaps between.

On a GPU the spans are kernels and copies as CUPTI saw them; on a CPU they are the operators that
Python called, without those that they call themselves. A gap is time between the first start and
the last end in which nothing ran: on a GPU the device waits for its host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ch15_helpers.bench.profiling import without_profiler_log

KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|_decode_kernel|_prefill|flash|fmha|_merge"),
    ("experts", r"moe|expert|grouped|_tile_kernel|_vector_"),
    ("matrix products", r"linear|addmm|::mm\b|matmul|gemm|gemv|nvjet|cutlass|splitk|mkl"),
    ("norm, rotation, activation", r"rms|norm|rope|swiglu|silu|::mul|::add|::roll|elementwise"),
    ("KV write and copies", r"memcpy|memset|copy|write_kv|index|gather|scatter|::cat\b|::to\b"),
    ("sampling", r"argm|::max\b|sample|softmax|topk|sort|reduce"),
)
OTHER, GAPS = "other", "gaps"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran: seconds from the step's first start."""

    name: str
    kind: str
    start_s: float
    duration_s: float


@dataclass(frozen=True)
class StepTrace:
    """One step.

    Attributes:
        spans: in order of their start. device_type: ``cpu`` or ``cuda``.
    """

    spans: tuple[Span, ...]
    device_type: str

    @property
    def wall_s(self) -> float:
        """From the first start to the last end."""
        return max((s.start_s + s.duration_s for s in self.spans), default=0.0)

    @property
    def busy_s(self) -> float:
        """Time in which at least one span ran."""
        busy, end = 0.0, 0.0
        for span in self.spans:
            stop = span.start_s + span.duration_s
            busy += max(0.0, stop - max(end, span.start_s))
            end = max(end, stop)
        return busy

    @property
    def gap_s(self) -> float:
        """Time in which nothing ran."""
        return self.wall_s - self.busy_s

    def by_kind(self) -> dict[str, float]:
        """Seconds of each kind that occurs, the largest first, and last the gaps."""
        total: dict[str, float] = {}
        for span in self.spans:
            total[span.kind] = total.get(span.kind, 0.0) + span.duration_s
        ranked = dict(sorted(total.items(), key=lambda item: -item[1]))
        return {**ranked, GAPS: self.gap_s}


def kind_of(name: str) -> str:
    """The kind of work that a kernel's or an operator's name tells."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), OTHER)


def trace_step(work: Callable[[], object], device_type: str) -> StepTrace:
    """Profile one call of ``work``; an unrecorded call before it wakes the profiler up.

    Args:
        work: one step; it is called twice.
        device_type: ``cuda`` looks at kernels, anything else at operators.

    Raises:
        ValueError: the call ran nothing that the profiler sees.
    """
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device_type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    for _ in range(2):
        with without_profiler_log(), profile(activities=activities) as recording:
            work()
            _synchronise(on_cuda)
    return from_events(recording.events() or (), device_type)


def from_events(events: Iterable[Any], device_type: str) -> StepTrace:
    """A trace from the profiler's events (times in µs).

    Raises:
        ValueError: none of the events belongs to the device.
    """
    wanted = [event for event in events if _belongs(event, device_type)]
    if not wanted:
        raise ValueError(f"the profiler saw nothing run on {device_type}: does the step do work?")
    wanted.sort(key=lambda event: event.time_range.start)
    first = wanted[0].time_range.start
    spans = tuple(
        Span(
            event.name,
            kind_of(event.name),
            (event.time_range.start - first) / 1e6,
            (event.time_range.end - event.time_range.start) / 1e6,
        )
        for event in wanted
    )
    return StepTrace(spans, device_type)


def table(traces: Mapping[str, StepTrace]) -> str:
    """Markdown: a row for each kind of work, two columns for each trace."""
    kinds = [kind for kind, _ in KINDS] + [OTHER, GAPS]
    times = {name: trace.by_kind() for name, trace in traces.items()}
    used = [kind for kind in kinds if any(kind in parts for parts in times.values())]
    lines = ["| | " + " | ".join(f"{name}, ms | share" for name in traces) + " |"]
    lines.append("|---|" + "--:|--:|" * len(traces))
    for kind in used:
        cells = []
        for name, trace in traces.items():
            part_s = times[name].get(kind, 0.0)
            cells.append(f"{part_s * 1e3:.3g} | {part_s / trace.wall_s:.0%}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    counts = [f"{trace.wall_s * 1e3:.3g} | {len(trace.spans)} spans" for trace in traces.values()]
    return "\n".join([*lines, "| whole | " + " | ".join(counts) + " |"])


def _belongs(event: Any, device_type: str) -> bool:
    on_device = "cuda" in str(event.device_type).lower()
    if device_type == "cuda":
        return on_device
    return not on_device and event.cpu_parent is None and "::" in event.name


def _synchronise(on_cuda: bool) -> None:
    if on_cuda:
        import torch

        torch.cuda.synchronize()
