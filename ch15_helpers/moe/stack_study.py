"""Some layers of a large model over real ranks, with one batch and with two in turn.

Attention, router, shared and routed experts have the sizes of a preset; weights are random. A
whole model of such a size would take minutes to make, and its layers are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.model.config import PRESETS
from ch15_helpers.model.moe import MoEBlock
from ch15_helpers.model.transformer import DecoderLayer, Transformer
from ch15_helpers.moe.captured import CapturedCall
from ch15_helpers.moe.expert_parallel import ExpertParallel, ExpertParallelConfig
from ch15_helpers.moe.experts import ExpertWeights, SharedExpert
from ch15_helpers.moe.model_overlap import before_experts
from ch15_helpers.moe.overlap import OverlapLayer, forward_micro_batches, time_versions
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.random_experts import random_shared, relative_error


@dataclass(frozen=True)
class StackVersion:
    """One way to run the layers.

    Attributes:
        batches: micro-batches. overlap: in turn, else one after the other.
        captured: replayed from a CUDA graph, with messages of a fixed size; else counts are traded.
    """

    name: str
    batches: int = 1
    overlap: bool = False
    captured: bool = False


@dataclass(frozen=True)
class StackStudy:
    """Layers, their versions, and sequences of each rank.

    Attributes:
        preset: a name of ``model.config.PRESETS`` with experts. num_layers: of them.
        shared_inner: inner size of a shared expert, 0 for none.
        sequences, length: of each rank, for each point. Length 1 is a decode step without context.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU for each rank).
    """

    num_ranks: int
    preset: str
    num_layers: int
    versions: tuple[StackVersion, ...]
    points: tuple[tuple[int, int], ...]
    shared_inner: int = 0
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "cuda"
    iterations: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        most = max((version.batches for version in self.versions), default=1)
        if any(sequences < most for sequences, _ in self.points):
            raise MoEError(f"points {self.points}: expected {most} sequences or more in each")
        if self.device == "cpu" and any(version.captured for version in self.versions):
            raise MoEError("a captured version needs ranks on GPUs: device is 'cpu'")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StackStudy:
        """What :meth:`to_dict` returned, perhaps after JSON made lists of its tuples."""
        versions = tuple(StackVersion(**entry) for entry in fields["versions"])
        points = tuple((sequences, length) for sequences, length in fields["points"])
        return cls(**{**fields, "versions": versions, "points": points})


@dataclass(frozen=True)
class StackRow:
    """One version on one point.

    Attributes:
        samples_s: one time for each round, the longest of all ranks.
        error: relative difference of the last hidden states to one rank with all experts, of the
            rank where it is largest.
    """

    version: str
    sequences: int
    length: int
    samples_s: tuple[float, ...]
    error: float


def run_stack_study(study: StackStudy, rank: int, device: torch.device) -> list[StackRow]:
    """This rank's rows, in an initialised process group."""
    model = _random_layers(study, device)
    generator = torch.Generator(device).manual_seed(study.seed)
    shared = [
        random_shared(model.config.hidden_size, study.shared_inner, model.dtype, device, generator)
        for _ in model.layers
    ]
    placement = ExpertPlacement.even(model.config.num_experts, study.num_ranks)
    top_k = model.config.num_experts_per_tok
    whole = [ExpertWeights(*_experts(layer)) for layer in model.layers]
    own = [weights.of_rank(placement, rank) for weights in whole]
    rows = []
    for sequences, length in study.points:
        generator.manual_seed(study.seed * 1009 + rank)
        shape = sequences * length, model.config.hidden_size
        x = torch.randn(shape, generator=generator, device=device, dtype=model.dtype)
        befores = [partial(before_experts, model, layer, length) for layer in model.layers]
        expected = _on_one_rank(befores, whole, shared, x)
        calls = {}
        for version in study.versions:
            most = -(-sequences // version.batches) * length
            how = ExpertParallelConfig(max_tokens=most if version.captured else None)
            layers = [
                OverlapLayer(
                    before,
                    ExpertParallel(mine, placement, top_k, how),
                    one,
                )
                for before, mine, one in zip(befores, own, shared, strict=True)
            ]
            calls[version.name] = _call(version, layers, x, length)
        errors = [relative_error(call(), expected) for call in calls.values()]
        times = time_versions(calls, device, iterations=study.iterations, warmup=study.warmup)
        rows += [
            StackRow(name, sequences, length, tuple(times[name]), error)
            for name, error in zip(calls, errors, strict=True)
        ]
    return rows


def _call(
    version: StackVersion, layers: list[OverlapLayer], x: Tensor, length: int
) -> Callable[[], Tensor]:
    def run(x: Tensor) -> Tensor:
        parts = x.view(-1, length, x.shape[1]).tensor_split(version.batches)
        flat = [part.flatten(0, 1) for part in parts]
        return torch.cat(forward_micro_batches(layers, flat, overlap=version.overlap))

    return CapturedCall(run, x).replay if version.captured else partial(run, x)


def _on_one_rank(
    befores: Sequence[Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]],
    whole: Sequence[ExpertWeights],
    shared: Sequence[SharedExpert | None],
    residual: Tensor,
) -> Tensor:
    for before, weights, one in zip(befores, whole, shared, strict=True):
        residual, x, *routing = before(residual)
        residual = residual + weights(x, *routing)
        residual = residual if one is None else residual + one(x)
    return residual


def _random_layers(study: StackStudy, device: torch.device) -> Transformer:
    """The same random layers on every rank, behind a vocabulary of one word."""
    longest = max(length for _, length in study.points)
    config = dataclasses.replace(
        PRESETS[study.preset], num_hidden_layers=study.num_layers, vocab_size=1,
        max_position_embeddings=longest,
    )  # fmt: skip
    model = Transformer(config, device, getattr(torch, study.dtype))
    generator = torch.Generator(device).manual_seed(study.seed)
    for _, weight in model.named_weights():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, float(weight.shape[-1] ** -0.5), generator=generator)
    return model


def _experts(layer: DecoderLayer) -> tuple[Tensor, Tensor]:
    assert isinstance(layer.mlp, MoEBlock)
    return layer.mlp.gate_up_proj, layer.mlp.down_proj
