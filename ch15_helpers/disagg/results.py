"""What comes out of a disaggregated run: outputs, handovers taken apart, and what each rank did.

Times are absolute on the monotonic clock, which all processes of a host share. Across hosts, what
lies between two ranks is only as good as the agreement of their clocks; durations within one rank
are right everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.spec import Role
from ch15_helpers.serving.metrics import Score, SLODefinition, Summary, score, summarise
from ch15_helpers.serving.request import SLO, RequestMetrics, RequestOutput

Span = tuple[float, float, int, float]
"""(send started, landed, bytes, ready): seconds from the start of the prefill."""


@dataclass(frozen=True)
class HandoverTimes:
    """One handover, taken apart. Seconds on the host's clock; each is taken in the workers.

    Attributes:
        prompt_tokens: of the request. num_bytes: that were sent. num_parts: in so many parts.
        num_messages, metadata_bytes: control messages of the two ranks about it.
        prefill_s: its first chunk starts → its first token is sampled.
        metadata_s: blocks are asked for → the prefill rank knows that it has them; ``blocked_s``
            of it the decode pool was full.
        orchestration_s: processor time of both ranks for messages, tables, tags and leases;
            copies and digests are not in it.
        pack_s, place_s: copies into and out of messages with their digests, on the two sides.
        bytes_s: while at least one part was under way, from its start to its landing.
        exposed_s: first token sampled → last block landed; what the request waits for bytes.
        wait_s: landed → taken into the decode batch, between two steps.
        first_step_s: taken in → second token.
        spans: of the parts. prefill_steps: (start, end) of the request's prefill steps.
    """

    prompt_tokens: int
    num_bytes: int
    num_parts: int
    num_messages: int
    metadata_bytes: int
    prefill_s: float
    metadata_s: float
    blocked_s: float
    orchestration_s: float
    pack_s: float
    place_s: float
    bytes_s: float
    exposed_s: float
    wait_s: float
    first_step_s: float
    spans: tuple[Span, ...] = ()
    prefill_steps: tuple[tuple[float, float], ...] = ()

    @property
    def handover_s(self) -> float:
        """From the first token to the second."""
        return self.exposed_s + self.wait_s + self.first_step_s


@dataclass(frozen=True)
class DisaggOutput(RequestOutput):
    """A RequestOutput, and where it was made.

    Attributes:
        prefill_rank, decode_rank: of the attempt that was answered; -1 where there was none.
        num_attempts: placements.
        handover: None when the first token ended the request, and for errors.
    """

    prefill_rank: int = -1
    decode_rank: int = -1
    num_attempts: int = 1
    handover: HandoverTimes | None = None


@dataclass(frozen=True)
class RankStats:
    """What one rank did since the run began.

    Attributes:
        num_steps, num_tokens, busy_s: engine steps, tokens through the model, time in steps.
        max_batch: most requests in one step.
        num_parts, num_bytes: sent, or received.
        num_blocks, used_blocks, peak_blocks: of the pool: all, now, and at most.
        num_recomputed: damaged blocks that were computed again. num_late: messages that came
            after their handover was given up.
        num_handovers, num_lost: handovers that succeeded, and those that were given up.
        backpressure_s: time for which handovers waited for blocks, summed.
        control_s: processor time for control, handovers of all requests together.
        num_drafted, num_accepted: tokens of speculation.
    """

    rank: int
    role: Role
    num_steps: int = 0
    num_tokens: int = 0
    busy_s: float = 0.0
    max_batch: int = 0
    num_parts: int = 0
    num_bytes: int = 0
    num_blocks: int = 0
    used_blocks: int = 0
    peak_blocks: int = 0
    num_recomputed: int = 0
    num_late: int = 0
    num_handovers: int = 0
    num_lost: int = 0
    backpressure_s: float = 0.0
    control_s: float = 0.0
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True)
class DisaggRun:
    """A list of requests, served.

    Attributes:
        outputs: in the order of the prompts. arrivals_s: when each arrived, from the start.
        ranks: by rank; the dead are missing.
        duration_s: first arrival to last token.
        overlap: parts were sent while the prefill ran. network: what was simulated, or None.
        num_replaced: placements beyond each request's first.
        num_late: answers that came after their attempt was closed, and were dropped.
    """

    outputs: Sequence[DisaggOutput]
    arrivals_s: Sequence[float]
    ranks: Sequence[RankStats]
    duration_s: float
    overlap: bool
    network: LinkModel | None
    num_replaced: int
    num_late: int

    @property
    def kind(self) -> Literal["measured", "modelled"]:
        """How numbers from it must be labelled."""
        return "measured" if self.network is None else "modelled"

    @property
    def handovers(self) -> list[HandoverTimes]:
        """Of all outputs that have one."""
        return [output.handover for output in self.outputs if output.handover is not None]

    def summary(self) -> Summary:
        """Latency percentiles and throughput."""
        return summarise(self.outputs, self.duration_s)

    def score(self, slo: SLO, definition: SLODefinition = "tpot") -> Score:
        """Attainment and goodput under an SLO."""
        return score(self.outputs, slo, self.duration_s, definition)


def metrics_of(
    token_times_s: Sequence[float], arrival_s: float, started_s: float | None, num_preemptions: int
) -> RequestMetrics:
    """Latencies from absolute times on one clock."""
    times = token_times_s
    return RequestMetrics(
        ttft_s=times[0] - arrival_s if times else None,
        tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        itl_s=[later - earlier for earlier, later in itertools.pairwise(times)],
        e2e_s=times[-1] - arrival_s if times else None,
        queue_s=None if started_s is None else started_s - arrival_s,
        num_preemptions=num_preemptions,
    )


def handover_times(sender: dict[str, Any], receiver: dict[str, Any]) -> HandoverTimes:
    """Join what the two ranks noted about one handover; absolute times on one clock.

    Args:
        sender: of ``Handover.notes``. receiver: of ``Arrival.notes``.
    """
    began_s, first_s = sender["began_s"], receiver["first_s"]
    landed_s, taken_s = receiver["landed_s"], receiver["taken_s"]
    parts = list(zip(sender["parts"], receiver["landed"], strict=True))
    spans = tuple(
        (start - began_s, landed - began_s, num_bytes, ready - began_s)
        for (start, ready, num_bytes), landed in parts
    )
    return HandoverTimes(
        prompt_tokens=receiver["prompt_tokens"],
        num_bytes=sum(span[2] for span in spans),
        num_parts=len(spans),
        num_messages=sender["num_messages"] + receiver["num_messages"],
        metadata_bytes=sender["metadata_bytes"] + receiver["metadata_bytes"],
        prefill_s=first_s - began_s,
        metadata_s=sender["metadata_s"],
        blocked_s=receiver["blocked_s"],
        orchestration_s=sender["control_s"] + receiver["control_s"],
        pack_s=sender["pack_s"],
        place_s=receiver["place_s"],
        bytes_s=union_s(spans),
        exposed_s=max(0.0, landed_s - first_s),
        wait_s=taken_s - max(landed_s, first_s),
        first_step_s=receiver["second_s"] - taken_s,
        spans=spans,
        prefill_steps=tuple((a - began_s, b - began_s) for a, b in sender["steps"]),
    )


def union_s(spans: Sequence[Span]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for start, stop, *_ in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
