"""How many requests a second one copy of the model serves within an SLO.

Prefill is a queue with one server and equal service times (M/D/1), whose waiting time has the
heavy-traffic tail ``P(wait > t) = rho * exp(-2 (1 - rho) t / s)``; its mean is the exact one. A
decode step of ``B`` sequences takes ``t(B)``, and by Little's law ``B`` is the rate times the time
that a request stays. Where both share the devices, prefill takes the share ``u`` of the time, and a
decode step lasts ``t(B) / (1 - u)``. The same quantities as in DistServe (Zhong et al., OSDI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.placement_cost import Cut, ModelCosts
from ch15_helpers.errors import PlacementError
from ch15_helpers.kv.sizing import exposed_handoff_s
from ch15_helpers.serving.request import SLO

_BISECTIONS = 50


@dataclass(frozen=True)
class ServingLoad:
    """What is asked for.

    Attributes:
        prompt_tokens, output_tokens: of every request.
        slo: limits that count.
        quantile: of the TTFT that must be within its limit.
        max_batch: sequences that one copy decodes at once, at most.
    """

    prompt_tokens: int
    output_tokens: int
    slo: SLO
    quantile: float = 0.9
    max_batch: int = 1024

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 2 or self.max_batch < 1:
            raise PlacementError(
                f"expected a prompt token, two output tokens and a batch of at least 1, got {self}"
            )
        if not 0 < self.quantile < 1:
            raise PlacementError(f"quantile must be in (0, 1), got {self.quantile}")

    @property
    def decode_steps(self) -> int:
        """Tokens after the first, which the prefill gives."""
        return self.output_tokens - 1

    @property
    def mean_context(self) -> float:
        """Cached tokens of a sequence, on average over its decode."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True)
class Operating:
    """One copy at some rate.

    Attributes:
        rate_per_s: requests. batch: sequences that decode at once.
        ttft_s: quantile of the load. tpot_s: mean.
        bound: what keeps the rate from being higher: ``ttft``, ``tpot``, ``memory``, ``batch``,
            ``handoff`` or ``load``.
    """

    rate_per_s: float
    batch: float
    ttft_s: float
    tpot_s: float
    bound: str


def wait_s(load: ServingLoad, rho: float, service_s: float) -> float:
    """Quantile of the time in the queue; infinite at a utilisation of 1."""
    if rho >= 1:
        return math.inf
    beyond = rho / (1 - load.quantile)
    return service_s / (2 * (1 - rho)) * math.log(beyond) if beyond > 1 else 0.0


def most_sequences(costs: ModelCosts, cut: Cut, load: ServingLoad) -> tuple[int, str]:
    """Sequences that one copy has memory for, and what bounds them."""
    room = costs.kv_tokens(cut) // (load.prompt_tokens + load.output_tokens)
    return (room, "memory") if room < load.max_batch else (load.max_batch, "batch")


def decode_step_s(costs: ModelCosts, cut: Cut, load: ServingLoad, batch: float) -> float:
    """One token for each of ``batch`` sequences, through all stages; a stage has its part."""
    return cut.pp * costs.decode(cut, batch / cut.pp, load.mean_context).total_s


def prefill_rate(
    costs: ModelCosts, cut: Cut, load: ServingLoad, link: LinkModel | None = None
) -> Operating:
    """The most requests that a copy prefills within the TTFT limit, and sends over its ports."""
    stage_s = costs.prefill(cut, load.prompt_tokens).total_s
    if cut.pp * stage_s > load.slo.ttft_s or most_sequences(costs, cut, load)[0] < 1:
        return Operating(0.0, 0.0, cut.pp * stage_s, 0.0, "ttft")
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = wait_s(load, middle, stage_s) + cut.pp * stage_s <= load.slo.ttft_s
        low, high = (middle, high) if fits else (low, middle)
    rate, bound = low * cut.groups / stage_s, "ttft"
    ports = port_rate(costs, cut, load, link)
    if ports < rate:
        rate, bound = ports, "handoff"
    rho = rate * stage_s / cut.groups
    ttft_s = wait_s(load, rho, stage_s) + cut.pp * stage_s
    return Operating(rate, 0.0, ttft_s, 0.0, bound)


def decode_rate(
    costs: ModelCosts,
    cut: Cut,
    load: ServingLoad,
    exposed_s: float = 0.0,
    link: LinkModel | None = None,
) -> Operating:
    """The most requests that a copy decodes within the TPOT limit, in its memory and its ports."""
    extra_s = exposed_s / load.decode_steps
    batch, bound = _largest(
        costs, cut, load, lambda n: decode_step_s(costs, cut, load, n) + extra_s <= load.slo.tpot_s
    )
    if batch < 1:
        return Operating(0.0, 0.0, 0.0, decode_step_s(costs, cut, load, 1) + extra_s, bound)
    step_s = decode_step_s(costs, cut, load, batch)
    rate, ports = batch / (load.decode_steps * step_s), port_rate(costs, cut, load, link)
    if ports < rate:
        rate, bound = ports, "handoff"
    return Operating(rate, batch, 0.0, step_s + extra_s, bound)


def together_rate(costs: ModelCosts, cut: Cut, load: ServingLoad) -> Operating:
    """The most requests that a copy serves when it prefills and decodes on the same devices."""
    batch, bound = _largest(
        costs, cut, load, lambda n: _meets(together(costs, cut, load, n), load.slo)
    )
    at = together(costs, cut, load, max(1, batch))
    if batch < 1:
        return Operating(0.0, 0.0, at.ttft_s, at.tpot_s, at.bound)
    if bound == "tpot":  # which of the two limits the next sequence would break
        over = together(costs, cut, load, batch + 1)
        bound = "tpot" if over.tpot_s > load.slo.tpot_s else "ttft"
    return Operating(at.rate_per_s, batch, at.ttft_s, at.tpot_s, bound)


def together(costs: ModelCosts, cut: Cut, load: ServingLoad, batch: float) -> Operating:
    """A copy that does both, with ``batch`` sequences decoding on average.

    From ``tpot = t / (1 - u)``, ``u = rate * s`` and ``batch = rate * steps * tpot``.
    """
    stage_s = costs.prefill(cut, load.prompt_tokens).total_s
    each_s, step_s = stage_s / cut.groups, decode_step_s(costs, cut, load, batch)
    rate = batch / (load.decode_steps * step_s + batch * each_s)
    waiting_s = wait_s(load, rate * each_s, stage_s)
    ttft_s = waiting_s + cut.pp * stage_s + step_s  # the step under way ends first
    tpot_s = step_s + batch * each_s / load.decode_steps
    return Operating(rate, batch, ttft_s, tpot_s, "load")


def closed_loop(
    costs: ModelCosts, prefill: Cut | None, decode: Cut, load: ServingLoad, num_open: int
) -> Operating:
    """One copy of each role with ``num_open`` requests at all times, each followed by a new one.

    This is what a small real run can be compared with: it needs no arrival process.

    Args:
        prefill: None when the decode copy prefills too.

    Returns:
        ``ttft_s`` is the prefill alone, with what it waits for the one before where prefill binds.
    """
    if prefill is None:
        at = together(costs, decode, load, num_open)
        stage_s = costs.prefill(decode, load.prompt_tokens).total_s
        return Operating(at.rate_per_s, num_open, decode.pp * stage_s, at.tpot_s, "load")
    stage_s = costs.prefill(prefill, load.prompt_tokens).total_s / prefill.groups
    low, high = 0.0, float(num_open)  # sequences that decode; the others prefill or wait for it
    for _ in range(_BISECTIONS):
        batch = (low + high) / 2
        step_s = decode_step_s(costs, decode, load, batch)
        rate = batch / (load.decode_steps * step_s)
        busy = num_open - rate * stage_s > batch and rate * stage_s < 1
        low, high = (batch, high) if busy else (low, batch)
    step_s = decode_step_s(costs, decode, load, low)
    rate = low / (load.decode_steps * step_s)
    ttft_s = max(stage_s, (num_open - low) / rate) if rate else stage_s
    bound = "prefill" if rate * stage_s > 1 - 1e-6 else "load"
    return Operating(rate, low, ttft_s, step_s, bound)


def handoff_s(
    costs: ModelCosts, prefill: Cut, decode: Cut, load: ServingLoad, link: LinkModel
) -> float:
    """What one request's KV transfer adds after its prefill, sent layer by layer meanwhile."""
    streams = min(prefill.num_devices, decode.num_devices)
    num_bytes = load.prompt_tokens * costs.kv_token_bytes
    transfer_s = link.latency_s + link.wire_s(math.ceil(num_bytes / streams))
    compute_s = prefill.pp * costs.prefill(prefill, load.prompt_tokens).total_s
    return exposed_handoff_s(transfer_s, compute_s, costs.config.num_hidden_layers)


def port_rate(costs: ModelCosts, cut: Cut, load: ServingLoad, link: LinkModel | None) -> float:
    """Requests a second whose KV cache the copy's ports carry; infinite without a link."""
    if link is None:
        return math.inf
    return cut.num_devices / link.wire_s(load.prompt_tokens * costs.kv_token_bytes)


def _meets(at: Operating, slo: SLO) -> bool:
    return at.ttft_s <= slo.ttft_s and at.tpot_s <= slo.tpot_s


def _largest(
    costs: ModelCosts, cut: Cut, load: ServingLoad, fits: Callable[[int], bool]
) -> tuple[int, str]:
    """The largest batch that ``fits``, which no larger one does again."""
    high, bound = most_sequences(costs, cut, load)
    if high < 1 or fits(high):
        return high, bound
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, "tpot"
