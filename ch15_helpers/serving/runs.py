"""What a run of a workload came to: measured on the engine, or modelled by the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ch15_helpers.serving.metrics import (
    Percentiles,
    Score,
    SLODefinition,
    Summary,
    percentiles,
    score,
    summarise,
)
from ch15_helpers.serving.request import SLO, RequestOutput


@dataclass(frozen=True)
class StepTotals:
    """Sums over the steps of a run.

    Attributes:
        num_steps: steps that computed something.
        num_tokens: tokens that went through the model.
        num_decode_tokens: those of them that were decodes.
        budget_tokens: what ``max_num_batched_tokens`` would have allowed in these steps.
        busy_s: time in steps.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_decode_tokens: int = 0
    budget_tokens: int = 0
    busy_s: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the token budget that was used; 0 without steps."""
        return self.num_tokens / self.budget_tokens if self.budget_tokens else 0.0

    @property
    def mean_batch(self) -> float:
        """Tokens per step."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True)
class ServingRun:
    """One workload, served. All times count from the start of the workload.

    Attributes:
        workload: its name.
        policy: name of the scheduling policy.
        outputs: one for each request of the workload, in its order. Latencies count from the
            moment the workload asked for, not from when the load generator got round to it.
        arrivals_s: that moment.
        duration_s: from the first arrival to the last token.
        steps: sums over the steps.
    """

    workload: str
    policy: str
    outputs: Sequence[RequestOutput]
    arrivals_s: Sequence[float]
    duration_s: float
    steps: StepTotals

    kind: ClassVar[Literal["measured", "modelled"]]

    def summary(self) -> Summary:
        """Latency percentiles and throughput."""
        return summarise(self.outputs, self.duration_s)

    def score(self, slo: SLO, definition: SLODefinition = "tpot") -> Score:
        """Attainment and goodput under an SLO."""
        return score(self.outputs, slo, self.duration_s, definition)


@dataclass(frozen=True)
class MeasuredRun(ServingRun):
    """A run of the real engine on a real clock.

    Attributes:
        lag_s: how late each request was really submitted. The driver submits between two steps,
            so a lag of one step is normal; more says that the load generator was the bottleneck.
    """

    lag_s: Sequence[float]

    kind: ClassVar[Literal["measured", "modelled"]] = "measured"

    @property
    def lag(self) -> Percentiles:
        """Percentiles of the lag."""
        return percentiles(self.lag_s)


@dataclass(frozen=True)
class ModelledRun(ServingRun):
    """A simulated run: a step-time model, a virtual clock.

    Attributes:
        fitted_on: what the step-time model was fitted on.
    """

    fitted_on: str

    kind: ClassVar[Literal["measured", "modelled"]] = "modelled"


def duration_from(outputs: Sequence[RequestOutput], arrivals_s: Sequence[float]) -> float:
    """First arrival to last token, on the arrivals' clock; 0 when no token came."""
    pairs = zip(outputs, arrivals_s, strict=True)
    ends = [at + o.metrics.e2e_s for o, at in pairs if o.metrics.e2e_s is not None]
    return max(ends) - min(arrivals_s) if ends else 0.0
