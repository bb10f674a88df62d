"""Where prefill and decode should stand: a costed search over cuts, copies and pools.

A plan either lets every copy of the model prefill and decode (*together*), or divides the devices
into a prefill and a decode pool (*apart*), whose ratio is kept within each node, each rack, or over
all devices; that level's link carries the KV cache. The search is exact: for one pair of cuts the
best ratio is where the two pools' rates cross, and pairs are looked at in the order of an upper
bound until none can be better. All numbers are *modelled*.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ch15_helpers.disagg.placement_cost import Cut, ModelCosts
from ch15_helpers.disagg.placement_plan import Plan, Pool, Prediction
from ch15_helpers.disagg.placement_rates import (
    Operating,
    ServingLoad,
    decode_rate,
    handoff_s,
    most_sequences,
    prefill_rate,
    together_rate,
)
from ch15_helpers.disagg.placement_topology import Level
from ch15_helpers.errors import PlacementError


@dataclass(frozen=True)
class SearchResult:
    """The best plan, and what it took to find it.

    Attributes:
        best: of the largest goodput; among equals the one with the fewest devices.
        together: the best plan without separate pools; None where none meets the SLO.
        examined, pruned: pairs of cuts that were evaluated, and that a bound ruled out.
    """

    best: Prediction
    together: Prediction | None
    examined: int
    pruned: int


def possible_cuts(costs: ModelCosts, load: ServingLoad, most_devices: int) -> list[Cut]:
    """Cuts whose weights and one request fit, degrees being powers of two; smallest first."""
    steps = [2**i for i in range(most_devices.bit_length())]
    found = [
        cut
        for degrees in itertools.product(steps, steps, steps, steps)
        if (cut := Cut(*degrees)).num_devices <= most_devices
        and cut.problem(costs.config) is None
        and most_sequences(costs, cut, load)[0] >= cut.groups
    ]
    return sorted(found, key=lambda cut: (cut.num_devices, cut))


def evaluate(plan: Plan, costs: ModelCosts, load: ServingLoad) -> Prediction:
    """Predict one plan at its best rate; a goodput of 0 where it cannot meet the SLO.

    Raises:
        PlacementError: the plan is not feasible: see ``problem``.
    """
    fault = problem(plan, costs, load)
    if fault is not None:
        raise PlacementError(f"{plan}: {fault}")
    if plan.prefill is None:
        at = together_rate(costs, plan.decode.cut, load)
        return _prediction(plan, costs, load, plan.decode.copies * at.rate_per_s, at, at, 0.0)
    level = _level(plan, costs)
    exposed_s, ahead, behind = _pair(costs, load, level, plan.prefill.cut, plan.decode.cut)
    rates = (plan.prefill.copies * ahead.rate_per_s, plan.decode.copies * behind.rate_per_s)
    return _prediction(plan, costs, load, plan.parts * min(rates), ahead, behind, exposed_s)


def problem(plan: Plan, costs: ModelCosts, load: ServingLoad) -> str | None:
    """Why a plan cannot be: devices, a cut that does not divide, memory. None if it can."""
    if plan.num_devices > costs.topology.num_devices:
        return f"{plan.num_devices} devices, there are {costs.topology.num_devices}"
    for pool in (plan.prefill, plan.decode):
        if pool is None:
            continue
        if pool.copies < 1:
            return "a pool without a copy of the model"
        fault = pool.cut.problem(costs.config)
        if fault is not None:
            return fault
        if most_sequences(costs, pool.cut, load)[0] < pool.cut.groups:
            return f"weights and one request do not fit into the memory of [{pool.cut}]"
    if plan.prefill is not None:
        level = _level(plan, costs)
        each = plan.num_devices // plan.parts
        if each > level.num_devices or plan.parts * level.num_devices > costs.topology.num_devices:
            return f"{plan.parts} parts of {each} devices do not fit into {level.name}s"
    return None


def search(costs: ModelCosts, load: ServingLoad, cuts: Sequence[Cut] | None = None) -> SearchResult:
    """The plan with the largest goodput; equal results on every run.

    Args:
        cuts: to choose from; default all of ``possible_cuts`` within two nodes.

    Raises:
        PlacementError: nothing fits into memory, or nothing meets the SLO; says which.
    """
    topology = costs.topology
    if cuts is None:
        most = min(topology.num_devices, 2 * topology.node.num_devices)
        cuts = possible_cuts(costs, load, most)
    if not cuts:
        raise PlacementError("the weights and one request fit on no cut of these devices")
    together = _best_together(costs, load, cuts)
    best, examined, pruned = together, 0, 0
    for bound, plan_of in sorted(_pairs(costs, load, cuts), key=lambda pair: -pair[0]):
        if best is not None and bound < best.goodput_per_s:
            pruned += 1
            continue
        examined += 1
        for plan in plan_of.plans():
            best = better(best, evaluate(plan, costs, load))
    if best is None or best.goodput_per_s <= 0:
        raise PlacementError(
            f"no plan keeps a TTFT of {load.slo.ttft_s:g} s and a TPOT of {load.slo.tpot_s:g} s"
        )
    return SearchResult(best, together, examined, pruned)


def better(one: Prediction | None, other: Prediction) -> Prediction:
    """The larger goodput; among equals fewer devices, then no separate pools, then the first."""
    if one is None:
        return other

    def rank(each: Prediction) -> tuple[float, int, bool]:
        return -each.goodput_per_s, each.plan.num_devices, each.plan.prefill is not None

    return other if rank(other) < rank(one) else one


@dataclass(frozen=True)
class _PairOfCuts:
    """A prefill and a decode cut at one level, with the rates of a copy of each."""

    prefill: Cut
    decode: Cut
    level: Level
    parts: int
    rates: tuple[float, float]

    def plans(self) -> Iterator[Plan]:
        """The best ratio is on one side of where the pools' rates cross."""
        sizes = self.prefill.num_devices, self.decode.num_devices
        most = (self.level.num_devices - sizes[1]) // sizes[0]

        def decodes(copies: int) -> int:
            return (self.level.num_devices - copies * sizes[0]) // sizes[1]

        low, high = 1, most  # the largest number of prefill copies that decode keeps up with
        while low < high:
            middle = (low + high + 1) // 2
            keeps_up = middle * self.rates[0] <= decodes(middle) * self.rates[1]
            low, high = (middle, high) if keeps_up else (low, middle - 1)
        for copies in range(low, min(low + 1, most) + 1):
            yield Plan(
                Pool(self.decode, decodes(copies)),
                Pool(self.prefill, copies),
                self.level.name,
                self.parts,
            )


def _pairs(
    costs: ModelCosts, load: ServingLoad, cuts: Sequence[Cut]
) -> Iterator[tuple[float, _PairOfCuts]]:
    """Every pair of cuts at every level, with what it would serve if copies were divisible."""
    for level in costs.topology.levels:
        parts = costs.topology.num_devices // level.num_devices
        ahead = {cut: prefill_rate(costs, cut, load, level.link) for cut in cuts}
        fastest = {cut: decode_rate(costs, cut, load, 0.0, level.link) for cut in cuts}
        for prefill, decode in itertools.product(cuts, cuts):
            fits = prefill.num_devices + decode.num_devices <= level.num_devices
            if not (fits and ahead[prefill].rate_per_s and fastest[decode].rate_per_s):
                continue
            exposed_s = handoff_s(costs, prefill, decode, load, level.link)
            behind = decode_rate(costs, decode, load, exposed_s, level.link)
            if not behind.rate_per_s:
                continue
            rates = ahead[prefill].rate_per_s, behind.rate_per_s
            each = prefill.num_devices / rates[0] + decode.num_devices / rates[1]
            bound = parts * level.num_devices / each * (1 + 1e-12)
            yield bound, _PairOfCuts(prefill, decode, level, parts, rates)


def _pair(
    costs: ModelCosts, load: ServingLoad, level: Level, prefill: Cut, decode: Cut
) -> tuple[float, Operating, Operating]:
    """(exposed handoff, a prefill copy, a decode copy) of a plan with two pools."""
    exposed_s = handoff_s(costs, prefill, decode, load, level.link)
    ahead = prefill_rate(costs, prefill, load, level.link)
    return exposed_s, ahead, decode_rate(costs, decode, load, exposed_s, level.link)


def _best_together(costs: ModelCosts, load: ServingLoad, cuts: Sequence[Cut]) -> Prediction | None:
    best: Prediction | None = None
    for cut in cuts:
        copies = costs.topology.num_devices // cut.num_devices
        if copies:
            best = better(best, evaluate(Plan(Pool(cut, copies)), costs, load))
    return best if best is not None and best.goodput_per_s > 0 else None


def _level(plan: Plan, costs: ModelCosts) -> Level:
    for level in costs.topology.levels:
        if level.name == plan.level:
            return level
    names = ", ".join(level.name for level in costs.topology.levels)
    raise PlacementError(f"{plan}: no level {plan.level!r}; there are {names}")


def _prediction(
    plan: Plan,
    costs: ModelCosts,
    load: ServingLoad,
    goodput_per_s: float,
    ahead: Operating,
    behind: Operating,
    exposed_s: float,
) -> Prediction:
    """Put together what the two sides say."""
    prefill = plan.prefill.cut if plan.prefill else plan.decode.cut
    decode, batch = plan.decode.cut, max(1.0, behind.batch)
    prefill_binds = plan.prefill is not None and (
        plan.prefill.copies * ahead.rate_per_s < plan.decode.copies * behind.rate_per_s
    )
    tokens_per_s = goodput_per_s * load.output_tokens
    kv_bytes = batch * (load.prompt_tokens + load.output_tokens) * costs.kv_token_bytes
    held = costs.weight_bytes(decode) + kv_bytes / decode.num_devices
    return Prediction(
        plan=plan,
        goodput_per_s=goodput_per_s,
        tokens_per_s_per_device=tokens_per_s / costs.topology.num_devices,
        ttft_s=ahead.ttft_s,
        tpot_s=behind.tpot_s,
        batch=behind.batch,
        handoff_s=exposed_s,
        bound=(f"prefill ({ahead.bound})" if prefill_binds else f"decode ({behind.bound})")
        if plan.prefill
        else behind.bound,
        prefill_cost=costs.prefill(prefill, load.prompt_tokens),
        decode_cost=costs.decode(decode, batch / decode.pp, load.mean_context),
        memory_fraction=held / costs.device.memory_bytes,
    )
