"""How much of a handover's bytes can hide behind the prefill that makes them, and how much does.

The keys and values of a layer are final as soon as the layer has run, so they can travel while the
next layers and chunks are computed (Splitwise, Patel et al., ISCA 2024; Mooncake, Qin et al., FAST
2025). What cannot hide: the last part, and whatever a link slower than the prefill leaves queued.
"""

from __future__ import annotations

from collections import deque
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


def part_ends(num_layers: int, layers_per_part: int, ratio: float = 1.0) -> list[int]:
    """After which layers of the last chunk a part is sent: few parts, the last one small.

    What cannot hide is the last part; each part costs control on both sides. A part is hidden if
    it has arrived when the layers behind it are computed, so of ``left`` layers all but
    ``left / (1 + ratio)`` may go together. Without a measured ratio that is half of them. Chunks
    before the last are one part each: they hide behind the next.

    Args:
        layers_per_part: of the last part.
        ratio: time to compute a layer over the time its bytes take.
    """
    ends, left = [], num_layers
    while left > layers_per_part:
        left = max(int(left / (1 + ratio)), layers_per_part)
        ends.append(num_layers - left)
    return [*ends, num_layers]


class Pace:
    """What a prefill rank has seen of its link and of its layers; from that, the ratio above."""

    def __init__(self) -> None:
        self._s_per_byte: deque[float] = deque(maxlen=8)
        self._layer_s_per_token: float | None = None

    def sent(self, num_bytes: int, seconds: float) -> None:
        """A part took so long, with what it waited for: the fastest of the last ones counts."""
        if num_bytes and seconds > 0:
            self._s_per_byte.append(seconds / num_bytes)

    def computed(self, num_tokens: int, num_layers: int, seconds: float) -> None:
        """So many layers of a step took so long."""
        if num_tokens and num_layers:
            self._layer_s_per_token = seconds / (num_tokens * num_layers)

    def forget_link(self) -> None:
        """The link is another one from now on."""
        self._s_per_byte.clear()

    def ratio(self, num_tokens: int, layer_bytes: int) -> float:
        """For a step of so many tokens, a layer of which leaves so many bytes to send.

        At least 1, which is also what nothing is known for: a slow link is no worse off than by
        halves. The link is taken to be half as fast as it was seen, as others may use it, too.
        """
        if not self._s_per_byte or self._layer_s_per_token is None or not layer_bytes:
            return 1.0
        bytes_s = 2 * min(self._s_per_byte) * layer_bytes
        return max(1.0, self._layer_s_per_token * num_tokens / bytes_s)


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
