"""One MoE layer over real ranks in several versions: times, bytes of each link, and errors.

A study is plain data that goes to the ranks as JSON (see ``launch``); every rank answers with
rows. Versions of a row ran interleaved on the same tokens, and each was compared with the same
layer on one rank.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.captured import CapturedCall
from ch15_helpers.moe.dispatch import Link
from ch15_helpers.moe.expert_parallel import ExpertParallel, ExpertParallelConfig
from ch15_helpers.moe.experts import ExpertWeights, SharedExpert
from ch15_helpers.moe.modelled_link import ModelledLink
from ch15_helpers.moe.overlap import forward_overlapped, forward_sequential, time_versions
from ch15_helpers.moe.overlap_model import PhaseTimes
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.random_experts import random_experts, random_shared, relative_error
from ch15_helpers.moe.routing import SyntheticRouter
from ch15_helpers.moe.topics import route_topics
from ch15_helpers.moe.topology import NodeGroups, make_expert_parallel, make_node_groups


@dataclass(frozen=True)
class Version:
    """One way to run the layer.

    Attributes:
        config: how tokens travel.
        overlap: shared expert and chunks beside the transfers; else phase after phase.
        num_chunks: parts of a batch, with ``overlap``.
        slots: experts of each rank's slots; None is the even placement.
        link: numbers of a ``ModelledLink``, in its order; None is the real link alone.
        bare: the collectives of this version with the same sizes, and nothing else: their limit.
        shift: a mutation that results must show: every rank holds its experts one slot too far.
        captured: replayed from a CUDA graph; needs messages of a fixed size.
    """

    name: str
    config: ExpertParallelConfig = dataclasses.field(default_factory=ExpertParallelConfig)
    overlap: bool = False
    num_chunks: int = 1
    slots: tuple[tuple[int, ...], ...] | None = None
    link: tuple[float, ...] | None = None
    bare: bool = False
    shift: bool = False
    captured: bool = False

    def __post_init__(self) -> None:
        if self.captured and self.config.max_tokens is None:
            raise MoEError(f"version {self.name!r}: captured needs messages of a fixed size")
        if self.config.ranks_per_node is not None and self.bare:
            raise MoEError(f"version {self.name!r}: bare is for one level of dispatch")


@dataclass(frozen=True)
class LayerStudy:
    """A layer, its versions and the batches that they run on.

    Attributes:
        tokens: for each point of the study, tokens of each rank.
        shared_inner: inner size of the shared expert; 0 for none.
        skew: of the synthetic router (Zipf). dtype: name, e.g. "bfloat16".
        topics: above 0, experts with the same remainder by it work together; see ``route_topics``.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU for each rank).
        iterations: timed rounds, after ``warmup``.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    hidden: int
    inner: int
    versions: tuple[Version, ...]
    tokens: tuple[tuple[int, ...], ...]
    shared_inner: int = 0
    skew: float = 0.0
    topics: int = 0
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    iterations: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        names = [version.name for version in self.versions]
        if not names or len(set(names)) != len(names):
            raise MoEError(f"versions {names}: expected at least one, with distinct names")
        if any(len(sizes) != self.num_ranks for sizes in self.tokens):
            raise MoEError(f"every point needs the tokens of each of {self.num_ranks} ranks")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise MoEError(f"dtype {self.dtype!r}; expected float32, float16 or bfloat16")
        if self.device != "cpu" and any(version.link for version in self.versions):
            raise MoEError("a modelled link holds up the host: it needs ranks on the CPU")
        if self.device == "cpu" and any(v.captured for v in self.versions):
            raise MoEError("a captured version needs ranks on GPUs: device is 'cpu'")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        fields = dataclasses.asdict(self)
        for version in fields["versions"]:
            kind = version["config"]["combine_dtype"]
            version["config"]["combine_dtype"] = str(kind).split(".")[-1] if kind else None
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerStudy:
        """What :meth:`to_dict` returned, perhaps after JSON made lists of its tuples."""
        versions = []
        for entry in fields["versions"]:
            config = dict(entry["config"])
            kind = config["combine_dtype"]
            config["combine_dtype"] = getattr(torch, kind) if kind else None
            slots = entry["slots"]
            versions.append(
                Version(
                    entry["name"], ExpertParallelConfig(**config), entry["overlap"],
                    entry["num_chunks"], slots and tuple(tuple(row) for row in slots),
                    entry["link"] and tuple(entry["link"]), entry["bare"], entry["shift"],
                    entry["captured"],
                )
            )  # fmt: skip
        tokens = tuple(tuple(sizes) for sizes in fields["tokens"])
        return cls(**{**fields, "versions": tuple(versions), "tokens": tokens})

    def batch(self, point: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, hidden], weights and experts [N, top_k] of a rank, on the CPU: known to anybody."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + point * 1009 + rank)
        size = self.tokens[point][rank]
        x = torch.randn(size, self.hidden, generator=generator)
        if self.topics:
            seed = (self.seed * 1009 + point) * self.num_ranks + rank
            routing = route_topics(size, self.num_experts, self.top_k, self.topics, seed=seed)
            return x.to(getattr(torch, self.dtype)), *routing
        router = SyntheticRouter(self.num_experts, self.top_k, skew=self.skew, seed=self.seed)
        for _ in range(point * self.num_ranks + rank):
            router.route(1)
        return x.to(getattr(torch, self.dtype)), *router.route(size)


@dataclass(frozen=True)
class StudyRow:
    """One version on one point.

    Attributes:
        samples_s: one time for each round, the longest of all ranks.
        error: norm of the difference to one rank with all experts, over that result's norm; the
            largest of all ranks.
        links: bytes of one call on each link: what travels, from, to.
        phases: medians of the version's phases alone, each the longest of all ranks.
    """

    version: str
    tokens: tuple[int, ...]
    samples_s: tuple[float, ...]
    error: float
    links: Counter[Link]
    phases: PhaseTimes


def run_study(study: LayerStudy, rank: int, device: torch.device) -> list[StudyRow]:
    """This rank's rows, in an initialised process group; links are those that it sent on."""
    weights, shared = _make_weights(study, device)
    placements = [
        ExpertPlacement(study.num_experts, v.slots)
        if v.slots
        else ExpertPlacement.even(study.num_experts, study.num_ranks)
        for v in study.versions
    ]
    nodes = sorted({v.config.ranks_per_node for v in study.versions if v.config.ranks_per_node})
    groups: dict[int | None, NodeGroups] = {size: make_node_groups(size) for size in nodes}
    layers = [
        make_expert_parallel(
            held_by(weights, placement, rank, version.shift), placement, study.top_k,
            version.config, node_groups=groups.get(version.config.ranks_per_node),
        )
        for version, placement in zip(study.versions, placements, strict=True)
    ]  # fmt: skip
    for version, layer in zip(study.versions, layers, strict=True):
        layer.model_link(make_link(version.link))
    rows: list[StudyRow] = []
    for point in range(len(study.tokens)):
        x, factors, experts = (part.to(device) for part in study.batch(point, rank))
        expected = weights(x, factors, experts)
        expected = expected if shared is None else expected + shared(x)
        rows += _run_point(study, point, layers, shared, (x, factors, experts), expected)
    return rows


def make_link(numbers: tuple[float, ...] | None) -> ModelledLink | None:
    """The modelled link of a version; see ``Version.link``."""
    if numbers is None:
        return None
    latency_s, rate, *node = numbers
    if not node:
        return ModelledLink(latency_s, rate)
    return ModelledLink(latency_s, rate, int(node[0]), *node[1:])


def held_by(
    weights: ExpertWeights, placement: ExpertPlacement, rank: int, shift: bool
) -> ExpertWeights:
    """What a rank holds of all experts; with ``shift`` each of them one slot too far."""
    row = placement.slots[rank]
    return weights.of_slots((*row[1:], row[0]) if shift else row)


def bare_call(layer: ExpertParallel, batch: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """The collectives of one call: messages of its sizes, out of and into nobody's rows."""
    x, weights, experts = batch
    (trip,) = layer.plan([(weights, experts)])
    size, wire = layer.row_bytes
    out = torch.zeros(sum(trip.sent), wire, dtype=torch.uint8, device=x.device)
    back = torch.zeros(sum(trip.received), size, dtype=torch.uint8, device=x.device)
    counts = trip.copies.counts

    def run() -> Tensor:
        if layer.config.max_tokens is None and counts is not None:
            layer.exchange.counts(counts[:, None])
        layer.exchange.start("dispatch", out, trip.sent, trip.received).wait()
        layer.exchange.start("combine", back, trip.received, trip.sent).wait()
        return x

    return run


def _run_point(
    study: LayerStudy,
    point: int,
    layers: list[ExpertParallel],
    shared: SharedExpert | None,
    batch: tuple[Tensor, Tensor, Tensor],
    expected: Tensor,
) -> list[StudyRow]:
    calls = {
        version.name: _call(version, layer, shared, batch)
        for version, layer in zip(study.versions, layers, strict=True)
    }
    results = []
    for version, layer in zip(study.versions, layers, strict=True):
        call = calls[version.name]
        counted = _call(replace(version, captured=False), layer, shared, batch)
        before = layer.link_bytes
        out = counted()
        links = layer.link_bytes - before
        out = call() if version.captured else out  # a replay counts nothing
        error = 0.0 if version.bare else relative_error(out, expected)
        results.append((error, links))
    times = time_versions(calls, batch[0].device, iterations=study.iterations, warmup=study.warmup)
    return [
        StudyRow(
            version.name, study.tokens[point], tuple(times[version.name]), error, links,
            measure_phases(layer, shared, batch, study.iterations),
        )
        for version, layer, (error, links) in zip(study.versions, layers, results, strict=True)
    ]  # fmt: skip


def _call(
    version: Version,
    layer: ExpertParallel,
    shared: SharedExpert | None,
    batch: tuple[Tensor, Tensor, Tensor],
) -> Callable[[], Tensor]:
    if version.bare:
        run = bare_call(layer, batch)
        return run if not version.captured else CapturedCall(lambda *_: run(), *batch).replay
    run_layer: Callable[..., Tensor] = partial(forward_sequential, layer, shared=shared)
    if version.overlap:
        chunks = version.num_chunks
        run_layer = partial(forward_overlapped, layer, shared=shared, num_chunks=chunks)
    if version.captured:
        return CapturedCall(run_layer, *batch).replay
    return partial(run_layer, *batch)


def measure_phases(
    layer: ExpertParallel,
    shared: SharedExpert | None,
    batch: tuple[Tensor, Tensor, Tensor],
    iterations: int,
) -> PhaseTimes:
    """Median seconds of each phase alone; packing belongs to the dispatch, counts to before."""
    x, weights, experts = batch
    (trip,) = layer.plan([(weights, experts)])
    arrived = layer.start_dispatch(x, trip)
    results = layer.compute(arrived, x.dtype)
    times = time_versions(
        {
            "before": lambda: layer.plan([(weights, experts)]),
            "dispatch": lambda: layer.start_dispatch(x, trip).wait(),
            "experts": lambda: layer.compute(arrived, x.dtype),
            "combine": lambda: layer.finish(layer.start_combine(results, trip), trip, x.dtype),
            "shared": lambda: shared(x) if shared is not None else None,
        },
        x.device,
        iterations=iterations,
    )
    middle = {name: median(samples) for name, samples in times.items()}
    return PhaseTimes(
        middle["dispatch"], middle["experts"], middle["combine"],
        middle["shared"] if shared is not None else 0.0, middle["before"],
    )  # fmt: skip


def _make_weights(
    study: LayerStudy, device: torch.device
) -> tuple[ExpertWeights, SharedExpert | None]:
    """The same random weights on every rank."""
    generator = torch.Generator(device).manual_seed(study.seed)
    dtype, hidden = getattr(torch, study.dtype), study.hidden
    weights = random_experts(study.num_experts, hidden, study.inner, dtype, device, generator)
    return weights, random_shared(hidden, study.shared_inner, dtype, device, generator)
