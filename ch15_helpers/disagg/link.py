"""Models of links: how long a message takes, with numbers that were fitted to measured transfers.

``seconds = latency + bytes / bandwidth``, the alpha-beta model (Hockney, 1994). Everything that
comes out of it is *modelled*, whatever it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinkModel:
    """One direction of a link.

    Attributes:
        latency_s: time of an empty message.
        bandwidth_GBps: bytes a second of a long one, in 1e9.
        loss: probability that a message is lost, in [0, 1).
        retransmit_s: a lost message is sent again after this time; None gives it up, and the
            receiver finds its blocks missing.
    """

    latency_s: float
    bandwidth_GBps: float
    loss: float = 0.0
    retransmit_s: float | None = None

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bandwidth_GBps > 0 and 0 <= self.loss < 1):
            raise ValueError(
                f"{self}: latency must not be negative, bandwidth positive, loss in [0, 1)"
            )
        if self.retransmit_s is not None and not self.retransmit_s > 0:
            raise ValueError(f"retransmit_s must be positive or None, got {self.retransmit_s}")

    def wire_s(self, num_bytes: int) -> float:
        """Seconds that the message occupies the link."""
        return num_bytes / (self.bandwidth_GBps * 1e9)

    def transfer_s(self, num_bytes: int) -> float:
        """Modelled seconds of one message on an idle link."""
        return self.latency_s + self.wire_s(num_bytes)


LINKS: Mapping[str, LinkModel] = {
    # One direction, a third off the datasheet's peak where it names raw signalling; latencies of
    # a small message between two processes. Starting points: replace them by fit_link.
    "nvlink4": LinkModel(latency_s=5e-6, bandwidth_GBps=400.0),
    "pcie5_x16": LinkModel(latency_s=8e-6, bandwidth_GBps=55.0),
    "400g": LinkModel(latency_s=10e-6, bandwidth_GBps=48.0),
    "100g": LinkModel(latency_s=12e-6, bandwidth_GBps=11.5),
    "25g_tcp": LinkModel(latency_s=60e-6, bandwidth_GBps=2.8),
}


@dataclass(frozen=True)
class LinkFit:
    """A link model and how well it repeats what was measured.

    Attributes:
        median_error, worst_error: of |modelled - measured| / measured over the samples.
        num_samples: how many there were.
    """

    link: LinkModel
    median_error: float
    worst_error: float
    num_samples: int


def fit_link(samples: Sequence[tuple[int, float]]) -> LinkFit:
    """Fit latency and bandwidth to measured (bytes, seconds).

    Least squares on relative errors, so that short messages count as much as long ones.

    Raises:
        ValueError: fewer than two sizes, times that are not positive, or times that do not grow
            with size: no bandwidth follows from those.
    """
    sizes = np.array([size for size, _ in samples], dtype=np.float64)
    times = np.array([seconds for _, seconds in samples], dtype=np.float64)
    if len(set(sizes.tolist())) < 2 or not (times > 0).all():
        raise ValueError("samples must have at least two sizes and positive times")
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    (latency_s, s_per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    if latency_s < 0:  # noise: the best fit without latency
        latency_s = 0.0
        ratio = sizes / times
        s_per_byte = ratio.sum() / (ratio @ ratio)
    if not s_per_byte > 0 or not math.isfinite(s_per_byte):
        raise ValueError("the times do not grow with the size; measure longer messages")
    link = LinkModel(float(latency_s), float(1e-9 / s_per_byte))
    errors = [abs(link.transfer_s(int(size)) - t) / t for size, t in zip(sizes, times, strict=True)]
    return LinkFit(link, float(np.median(errors)), max(errors), len(samples))
