"""Plans of the placement planner, and what is predicted of one."""

from __future__ import annotations

from dataclasses import dataclass

from ch15_helpers.disagg.placement_cost import Cut, PassCost


@dataclass(frozen=True)
class Pool:
    """Equal copies of the model."""

    cut: Cut
    copies: int

    @property
    def num_devices(self) -> int:
        """Devices of all copies."""
        return self.copies * self.cut.num_devices

    def __str__(self) -> str:
        return f"{self.copies} × [{self.cut}]"


@dataclass(frozen=True)
class Plan:
    """What each device does.

    Attributes:
        decode: the pool that decodes; without ``prefill`` it prefills too.
        prefill: the pool that prefills, or None.
        level: within which part of the topology the ratio of the pools is kept; the copies of both
            pools are those of one such part. None without a prefill pool.
        parts: how many such parts there are.
    """

    decode: Pool
    prefill: Pool | None = None
    level: str | None = None
    parts: int = 1

    @property
    def num_devices(self) -> int:
        """Devices that have work."""
        prefill = self.prefill.num_devices if self.prefill else 0
        return self.parts * (self.decode.num_devices + prefill)

    def __str__(self) -> str:
        if self.prefill is None:
            return f"together: {self.decode}"
        where = f" in each of {self.parts} {self.level}s" if self.parts > 1 else ""
        return f"apart: prefill {self.prefill}, decode {self.decode}{where}"


@dataclass(frozen=True)
class Prediction:
    """A plan at the highest rate that it serves within the SLO. All times in seconds.

    Attributes:
        goodput_per_s: requests a second, on all devices.
        tokens_per_s_per_device: output tokens over all devices of the topology.
        ttft_s: quantile of the load. tpot_s: mean, with the handoff's share.
        batch: sequences that a copy decodes at once.
        handoff_s: what the KV transfer adds to a request.
        bound: what keeps the rate from being higher.
        prefill_cost, decode_cost: a stage's pass over one prompt, and over the batch.
        memory_fraction: of the fullest device, weights and the batch's KV cache.
    """

    plan: Plan
    goodput_per_s: float
    tokens_per_s_per_device: float
    ttft_s: float
    tpot_s: float
    batch: float
    handoff_s: float
    bound: str
    prefill_cost: PassCost
    decode_cost: PassCost
    memory_fraction: float

    def explain(self) -> list[str]:
        """Where the time of a prompt and of a decode step goes, and what binds."""
        lines = [f"{self.plan}; {self.goodput_per_s:.4g} requests/s, bound by {self.bound}"]
        for name, cost in (("prefill", self.prefill_cost), ("decode", self.decode_cost)):
            lines.append(
                f"{name}: memory {cost.memory_s * 1e3:.2f} ms, compute {cost.compute_s * 1e3:.2f}, "
                f"communication {cost.communication_s * 1e3:.2f}, overhead "
                f"{cost.overhead_s * 1e3:.2f}; largest: {cost.bound_by}"
            )
        lines.append(
            f"TTFT {self.ttft_s * 1e3:.0f} ms, TPOT {self.tpot_s * 1e3:.1f} ms, handoff "
            f"{self.handoff_s * 1e3:.2f} ms, batch {self.batch:.0f}, memory "
            f"{self.memory_fraction:.0%}"
        )
        return lines
