"""The targets: which exist, which notebook holds each, what each needs.

A target is a baseline and an optimised version with a name. The notebook is its only source; the
entry here says where it is. A chapter that is added adds its entry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ch15_helpers.errors import Ch15Error, HardwareError, UnknownTargetError

PREFIX = "ch15"


class Validation(NamedTuple):
    """Outcome of a target's validator: whether the promised bound held, and the evidence."""

    passed: bool
    report: str


@dataclass(frozen=True)
class Target:
    """One baseline→optimised pair.

    Attributes:
        name: as in ``ch15:NAME``. notebook: file name in ``book/``. summary: one line.
        cuda: needs a CUDA device. ranks: processes (and GPUs, where ``cuda``) it needs.
        validator: ``module:function`` that returns a :class:`Validation`, where the chapter
            promises a bound.
    """

    name: str
    notebook: str
    summary: str
    cuda: bool = False
    ranks: int = 1
    validator: str | None = None

    @property
    def chapter(self) -> str:
        return Path(self.notebook).stem

    @property
    def needs(self) -> str:
        """``cpu``, ``cuda``, ``2 ranks`` or ``cuda, 2 ranks``."""
        ranks = [f"{self.ranks} ranks"] if self.ranks > 1 else []
        if self.cuda:
            return ", ".join(["cuda", *ranks])
        return ranks[0] if ranks else "cpu"

    def check_needs(self, device: str) -> None:
        """Raise where this machine, or the device asked for, cannot run the target.

        Raises:
            HardwareError: says what is needed and what is here.
        """
        if not self.cuda:
            return
        from ch15_helpers.hardware import available_devices

        here = available_devices()
        if device == "cpu" or len(here) - 1 < self.ranks:
            raise HardwareError(
                f"target {self.name} needs {self.needs}; --device is {device} and here are: "
                f"{', '.join(here)}"
            )


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        t.name: t
        for t in (
            Target(
                "inference_monolithic",
                "inference_monolithic.ipynb",
                "recompute every token → paged KV cache, one engine on one device",
            ),
            Target(
                "continuous_batching",
                "continuous_batching.ipynb",
                "fair static batches → chunked, deadline-aware continuous batching under open load",
                validator="ch15_helpers.bench.validate_batching:validate_simulator_error",
            ),
            Target(
                "continuous_batching_multigpu",
                "continuous_batching_multigpu.ipynb",
                "round robin → KV-aware routing with a load cap, over replicas",
            ),
            Target(
                "kv_cache_management_math",
                "kv_cache_management_math.ipynb",
                "always recompute, or always fetch → the cheaper of the two by the break-even",
            ),
            Target(
                "kv_cache_management",
                "kv_cache_management.ipynb",
                "contiguous buffers → paged blocks with prefix sharing and eviction",
                validator="ch15_helpers.bench.validate_kv:validate_decode_latency",
            ),
            Target(
                "kv_cache_nvlink_pool",
                "kv_cache_nvlink_pool.ipynb",
                "local HBM only → tiers (host, disk) with prefetch, at equal local memory",
            ),
            Target(
                "kv_cache_nvlink_pool_multigpu",
                "kv_cache_nvlink_pool_multigpu.ipynb",
                "host offload → peer memory over the device link, at equal local memory",
            ),
            Target(
                "disaggregated_inference",
                "disaggregated_inference.ipynb",
                "prefill and decode in one pool → two pools with a KV handoff, on one device",
            ),
            Target(
                "prefill_decode_disagg",
                "prefill_decode_disagg.ipynb",
                "handoff after the whole prompt → layer by layer, under the prefill's compute",
                ranks=2,
            ),
            Target(
                "disaggregated_inference_multigpu",
                "disaggregated_inference_multigpu.ipynb",
                "prefill and decode ranks → speculation on the decode side, over a network",
                ranks=2,
            ),
            Target(
                "inference_placement",
                "inference_placement.ipynb",
                "even split of the devices → a costed search over parallelism and pools",
                ranks=2,
            ),
            Target(
                "speculative_decoding",
                "speculative_decoding.ipynb",
                "one token a step → drafts verified in one step, with adaptive length",
            ),
            Target(
                "moe_inference",
                "moe_inference.ipynb",
                "a loop over experts → sorted dispatch and grouped GEMM",
            ),
            Target(
                "moe_overlap",
                "moe_overlap.ipynb",
                "dispatch, experts, combine in turn → shared expert and batches overlapped",
                ranks=2,
            ),
            Target(
                "wide_ep",
                "wide_ep.ipynb",
                "one copy of a token for each expert → deduplicated, packed, FP8 dispatch",
                ranks=4,
            ),
            Target(
                "moe_routing_topology_aware",
                "moe_routing_topology_aware.ipynb",
                "flat all-to-all → hierarchical dispatch and topology-aware placement",
                ranks=4,
            ),
        )
    }
)


def existing(book: Path, registry: Mapping[str, Target] = TARGETS) -> dict[str, Target]:
    """Targets whose notebook is in the book."""
    return {name: t for name, t in registry.items() if (book / t.notebook).exists()}


def select(spec: str, available: Mapping[str, Target]) -> list[Target]:
    """Targets that ``ch15`` (all) or ``ch15:NAME[,NAME]`` names, in the order given.

    Raises:
        UnknownTargetError: anything else; lists the valid names.
    """
    valid = f"valid targets: {PREFIX} (all), {', '.join(f'{PREFIX}:{n}' for n in available)}"
    if spec == PREFIX:
        if not available:
            raise UnknownTargetError("no target has a notebook in this book yet")
        return list(available.values())
    chapter, colon, names = spec.partition(":")
    if chapter != PREFIX or not colon:
        raise UnknownTargetError(f"unknown target {spec!r}; {valid}")
    return [find(name.strip(), available) for name in dict.fromkeys(names.split(","))]


def find(name: str, available: Mapping[str, Target]) -> Target:
    """One target by its plain name.

    Raises:
        UnknownTargetError: lists the valid names.
    """
    if name not in available:
        raise UnknownTargetError(
            f"unknown target {name!r}; valid targets: {', '.join(available) or 'none'}"
        )
    return available[name]


def validator_of(target: Target, available: Mapping[str, Target]) -> Callable[[], Validation]:
    """The function that checks the target's promised bound.

    Raises:
        UnknownTargetError: the chapter promises none; lists the targets that do.
    """
    if target.validator is None:
        having = [t.name for t in available.values() if t.validator]
        raise UnknownTargetError(
            f"target {target.name!r} has no validator, because its chapter promises no bound; "
            f"targets with one: {', '.join(having) or 'none'}"
        )
    module, _, function = target.validator.partition(":")
    loaded = getattr(importlib.import_module(module), function, None)
    if not callable(loaded):
        raise Ch15Error(f"validator {target.validator!r} of {target.name} is not a function")
    return loaded  # type: ignore[no-any-return]
