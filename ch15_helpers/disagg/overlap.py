"""How much of a handover's bytes can hide behind the prefill that makes them, and how much does.

The keys and values of a layer are final as soon as the layer has run, so they can travel while the
next layers and chunks are computed (Splitwise, Patel et al., ISCA 2024; Mooncake, Qin et al., FAST
2025). What cannot hide: the last part, and whatever a link slower than the prefill leaves queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.results import DisaggRun


@dataclass(frozen=True)
class ModelledOverlap:
    """One handover on an idle link; *modelled*, in seconds.

    Attributes:
        bytes_s: of all parts one after the other: what a request waits when nothing hides.
        exposed_s: from the end of the prefill to the end of the last part.
    """

    bytes_s: float
    exposed_s: float

    @property
    def hidden_share(self) -> float:
        """Share of the bytes' time that the request does not wait for."""
        return 1 - self.exposed_s / self.bytes_s if self.bytes_s else 0.0


def modelled_overlap(
    part_bytes: Sequence[int], ready_s: Sequence[float], prefill_s: float, link: LinkModel
) -> ModelledOverlap:
    """Parts travel in order; each starts when it is ready and the link is free.

    Args:
        part_bytes: size of each part.
        ready_s: when each is computed, from the start of the prefill.
        prefill_s: when the first token is sampled.
        link: latency of a part overlaps the part before it, its bytes do not.
    """
    free_s = 0.0
    arrived_s = prefill_s
    for num_bytes, ready in zip(part_bytes, ready_s, strict=True):
        start_s = max(ready, free_s)
        free_s = start_s + link.wire_s(num_bytes)
        arrived_s = max(arrived_s, free_s + link.latency_s)
    return ModelledOverlap(link.transfer_s(sum(part_bytes)), arrived_s - prefill_s)


def part_ends(num_layers: int, layers_per_part: int) -> list[int]:
    """After which layers of the last chunk a part is sent: halves of what is left, down to a size.

    What cannot hide is the last part, so that one is small; each part costs control on both
    sides, so there are few. Chunks before the last are one part each: they hide behind the next.
    """
    ends, left = [], num_layers
    while left > layers_per_part:
        left = max(left // 2, layers_per_part)
        ends.append(num_layers - left)
    return [*ends, num_layers]


def even_parts(
    num_bytes: int, num_chunks: int, num_layers: int, layers_per_part: int, prefill_s: float
) -> tuple[list[int], list[float]]:
    """(bytes, ready times) of the parts of a prefill whose chunks and layers take equal times."""
    sizes, ready_s = [], []
    for chunk in range(num_chunks):
        is_last = chunk == num_chunks - 1
        ends = part_ends(num_layers, layers_per_part) if is_last else [num_layers]
        for first, last in pairwise([0, *ends]):
            sizes.append(num_bytes * (last - first) // (num_chunks * num_layers))
            ready_s.append((chunk + last / num_layers) * prefill_s / num_chunks)
    return sizes, ready_s


@dataclass(frozen=True)
class OverlapReport:
    """Two runs of the same requests: bytes after the prefill, and bytes under it. Medians.

    Attributes:
        bytes_s: what the requests waited for bytes without overlap.
        exposed_s: what they waited with it.
        modelled_share: share that could hide, from when the parts were ready and the rate at
            which the bytes moved without overlap.
    """

    bytes_s: float
    exposed_s: float
    modelled_share: float

    @property
    def hidden_share(self) -> float:
        """Share of the bytes' time that hides behind the prefill."""
        return 1 - self.exposed_s / self.bytes_s if self.bytes_s else 0.0


def overlap_report(whole: DisaggRun, layered: DisaggRun) -> OverlapReport:
    """Compare a run with ``overlap=False`` and one with ``overlap=True``.

    Raises:
        ValueError: the runs are not that, or have no handovers.
    """
    if whole.overlap or not layered.overlap:
        raise ValueError("the first run must be without overlap, the second with it")
    if not whole.handovers or not layered.handovers:
        raise ValueError("a run has no handovers: there is nothing to compare")
    bytes_s = median(handover.exposed_s for handover in whole.handovers)
    rates = [h.num_bytes / h.exposed_s for h in whole.handovers if h.exposed_s > 0]
    link = LinkModel(0.0, max(median(rates), 1.0) / 1e9 if rates else 1e6)
    shares = []
    for handover in layered.handovers:
        sizes = [span[2] for span in handover.spans]
        ready_s = [span[3] for span in handover.spans]
        shares.append(modelled_overlap(sizes, ready_s, handover.prefill_s, link).hidden_share)
    exposed_s = median(handover.exposed_s for handover in layered.handovers)
    return OverlapReport(bytes_s, exposed_s, median(shares))
