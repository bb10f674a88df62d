"""What overlap should give: phases on two resources, one that computes and one that sends.

All numbers from here are *modelled*; the phases that go in may be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a layer's phases for one micro-batch.

    Attributes:
        before_s: attention, norm and router. dispatch_s, combine_s: on the link.
        experts_s: of this rank. shared_s: of the shared expert.
    """

    dispatch_s: float
    experts_s: float
    combine_s: float
    shared_s: float = 0.0
    before_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.before_s + self.dispatch_s + self.experts_s + self.combine_s + self.shared_s


def overlapped_s(batches: Sequence[PhaseTimes], num_layers: int = 1) -> float:
    """Modelled seconds of ``run_in_turn`` over some micro-batches.

    One after the other on each resource: compute in the order in which it is launched, transfers
    in the order in which they are started. The shared expert has two thirds of its work beside
    the dispatch and one third beside the combine.
    """
    compute_s = link_s = 0.0
    ready_s = [0.0] * len(batches)  # when a batch's last transfer is over
    for _ in range(num_layers):
        for i, batch in enumerate(batches):
            compute_s = max(compute_s, ready_s[i]) + batch.before_s
            link_s = ready_s[i] = max(link_s, compute_s) + batch.dispatch_s
            compute_s += batch.shared_s * 2 / 3
        for i, batch in enumerate(batches):
            compute_s = max(compute_s, ready_s[i]) + batch.experts_s
            link_s = ready_s[i] = max(link_s, compute_s) + batch.combine_s
            compute_s += batch.shared_s / 3
    return max(compute_s, *ready_s)


def two_batch_gain(
    phases: Callable[[int], PhaseTimes], num_tokens: int, num_layers: int = 1
) -> float:
    """Time of one whole batch over that of two overlapped halves: above 1 they win.

    A half costs more than half wherever a phase has a floor (weights to read, latency), which is
    why two batches lose when there are few tokens.

    Args:
        phases: times of a micro-batch of so many tokens. The whole batch overlaps only its own
            shared expert.
    """
    whole_s = overlapped_s([phases(num_tokens)], num_layers)
    first = num_tokens - num_tokens // 2
    halves = [phases(first), phases(num_tokens - first)]
    return whole_s / overlapped_s(halves, num_layers)


def crossover(
    phases: Callable[[int], PhaseTimes], candidates: Sequence[int], num_layers: int = 1
) -> int | None:
    """The first of ``candidates`` (tokens, ascending) from which two batches always win.

    None when they lose at the last one.
    """
    found = None
    for num_tokens in reversed(candidates):
        if two_batch_gain(phases, num_tokens, num_layers) <= 1:
            break
        found = num_tokens
    return found
