"""Serving while loads drift, over real ranks: rebalancing moves weights, and its stall is timed.

Both versions serve the same batches. What ``rebalance.serve_under_drift`` models is done here: the
same loads are seen, the same placements found, and weights really move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.balancing import balance_greedy, imbalance
from ch15_helpers.moe.expert_parallel import ExpertParallel
from ch15_helpers.moe.experts import ExpertWeights
from ch15_helpers.moe.overlap import timed_together
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.random_experts import random_experts, relative_error
from ch15_helpers.moe.rebalance import keep_in_place, rebalance
from ch15_helpers.moe.routing import SyntheticRouter, expert_counts


@dataclass(frozen=True)
class DriftStudy:
    """A layer that serves batches while the hot experts change.

    Attributes:
        slots_per_rank: more than an even share leaves room for replicas.
        tokens: of each rank in each batch. shift_at: batch at which others become hot, or None.
        skew, drift: of the router. interval: batches from one rebalance to the next.
        window: batches whose loads are averaged.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    hidden: int
    inner: int
    slots_per_rank: int
    tokens: int
    num_batches: int
    interval: int
    window: int
    skew: float = 1.0
    drift: float = 0.0
    shift_at: int | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(self.num_batches, self.interval, self.window, self.tokens) < 1:
            raise MoEError(
                f"{self.num_batches} batches of {self.tokens} tokens, interval {self.interval}, "
                f"window {self.window}; expected 1 or more of each"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DriftStudy:
        """What :meth:`to_dict` returned."""
        return cls(**fields)

    def routing(self) -> list[list[tuple[Tensor, Tensor]]]:
        """(weights, experts) of each rank in each batch, known to anybody."""
        router = SyntheticRouter(
            self.num_experts, self.top_k, skew=self.skew, drift=self.drift, seed=self.seed
        )
        batches = []
        for batch in range(self.num_batches):
            if batch == self.shift_at:
                router.shift()
            whole = router.route(self.tokens * self.num_ranks)
            parts = [part.chunk(self.num_ranks) for part in whole]
            batches.append(list(zip(*parts, strict=True)))
        return batches

    def counts(self) -> list[list[int]]:
        """Pairs of each expert in each batch."""
        return [
            expert_counts(torch.cat([ids for _, ids in ranks]), self.num_experts).tolist()
            for ranks in self.routing()
        ]


@dataclass(frozen=True)
class DriftRow:
    """One version, "fixed" or "rebalanced".

    Attributes:
        samples_s: time of each batch, the longest of all ranks, stalls not included.
        stalls_s: time of each rebalance. moved_bytes: over all links.
        max_over_mean: pairs of the busiest rank over the mean, batch by batch.
        error: largest of all batches and ranks, against one rank with all experts.
    """

    version: str
    samples_s: tuple[float, ...]
    stalls_s: tuple[float, ...]
    moved_bytes: int
    max_over_mean: tuple[float, ...]
    error: float


def run_drift_study(study: DriftStudy, rank: int, device: torch.device) -> list[DriftRow]:
    """This rank's rows, in an initialised process group; bytes are those that it sent."""
    weights = random_experts(
        study.num_experts, study.hidden, study.inner, getattr(torch, study.dtype), device,
        torch.Generator(device).manual_seed(study.seed),
    )  # fmt: skip
    return [_serve(study, weights, rank, device, moving) for moving in (False, True)]


def _serve(
    study: DriftStudy, weights: ExpertWeights, rank: int, device: torch.device, moving: bool
) -> DriftRow:
    placement = ExpertPlacement.even(study.num_experts, study.num_ranks, study.slots_per_rank)
    layer = ExpertParallel(weights.of_rank(placement, rank), placement, study.top_k)
    counts, generator = study.counts(), torch.Generator().manual_seed(study.seed + rank)
    samples, stalls, ratios, moved, error = [], [], [], 0, 0.0
    routing = study.routing()
    _warm_up(layer, study.tokens, *(part.to(device) for part in routing[0][rank]))
    for batch, ranks in enumerate(routing):
        if moving and batch and batch % study.interval == 0:
            seen = np.mean(np.asarray(counts[max(0, batch - study.window) : batch]), axis=0)
            sent, stall_s = timed_together(partial(_move, layer, seen.tolist()), device)
            stalls.append(stall_s)
            moved += sent
        x = torch.randn(study.tokens, study.hidden, generator=generator)
        x = x.to(device, getattr(torch, study.dtype))
        factors, experts = (part.to(device) for part in ranks[rank])
        out, batch_s = timed_together(partial(layer, x, factors, experts), device)
        samples.append(batch_s)
        error = max(error, relative_error(out, weights(x, factors, experts)))
        ratios.append(imbalance(counts[batch], layer.placement))
    longest = torch.tensor(samples + stalls, dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    times, size = longest.tolist(), len(samples)
    name = "rebalanced" if moving else "fixed"
    return DriftRow(name, tuple(times[:size]), tuple(times[size:]), moved, tuple(ratios), error)


def _warm_up(layer: ExpertParallel, tokens: int, weights: Tensor, experts: Tensor) -> None:
    down = layer.experts.down
    layer(down.new_zeros(tokens, down.shape[1]), weights, experts)


def _move(layer: ExpertParallel, loads: Sequence[float]) -> int:
    """Bytes that this rank sent for the placement that suits ``loads``."""
    old = layer.placement
    new = balance_greedy(loads, old.num_ranks, old.slots_per_rank, current=old)
    return sum(rebalance(layer, keep_in_place(old, new)).values())
