"""Which experts tokens choose: routers of three families, and routing that is made up or recorded.

Mixtral and Qwen3-MoE share :func:`ch15_helpers.kernels.moe_route.route_topk` (softmax, top k,
normalised or not). DeepSeek-V3 (2024) scores by a sigmoid, adds a bias to the *choice* only, which
balances loads without an auxiliary loss (Wang et al., 2024), and lets a token use few groups of
experts, so that it visits few nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.moe_permute import sort_by_expert
from ch15_helpers.model.moe import MoEBlock
from ch15_helpers.model.transformer import Transformer

_TILE = 1 << 20  # tiles of the order are not used here: as few as possible


def route_sigmoid(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    normalise: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router.

    Args:
        logits: [num_tokens, num_experts].
        bias: float32 [num_experts], added to the scores for the choice, not to the weights.
        num_groups: experts lie in this many groups of equal size; a group's score is the sum of
            its two best experts.
        top_groups: a token chooses among the experts of this many groups (its nodes).
        scaling: factor of all weights (``routed_scaling_factor``).

    Returns:
        weights float32 and expert ids int64, both [num_tokens, top_k]; ids of a token are distinct.

    Raises:
        MoEError: groups of unequal size, or fewer experts in the chosen groups than ``top_k``.
    """
    num_tokens, num_experts = logits.shape
    size = num_experts // num_groups
    if size * num_groups != num_experts or not 1 <= top_groups <= num_groups:
        raise MoEError(
            f"{num_experts} experts, num_groups {num_groups}, top_groups {top_groups}; expected "
            "groups of equal size and between 1 and num_groups of them"
        )
    if not 1 <= top_k <= top_groups * size:
        raise MoEError(f"top_k {top_k} is not between 1 and the {top_groups * size} eligible")
    scores = logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    if top_groups < num_groups:
        grouped = choice.view(num_tokens, num_groups, size)
        best = grouped.topk(min(2, size), dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        closed = torch.ones(num_tokens, num_groups, dtype=torch.bool, device=logits.device)
        closed.scatter_(1, best, False)
        choice = grouped.masked_fill(closed[:, :, None], -math.inf).flatten(1)
    experts = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, experts


def update_bias(bias: Tensor, counts: Tensor, rate: float = 1e-3) -> Tensor:
    """One step of the auxiliary-loss-free balance: less for overloaded experts, more for others.

    Args:
        bias: float32 [num_experts]. counts: tokens of each expert in the last batch.
    """
    loads = counts.to(bias.dtype)
    return bias + rate * torch.sign(loads.mean() - loads)


def expert_counts(experts: Tensor, num_experts: int) -> Tensor:
    """Pairs of each expert, int64 [num_experts]; no word to the host. Ids below zero count nowhere.

    Args:
        experts: int64 [num_tokens, top_k], ids below ``num_experts``.
    """
    flat = experts.flatten().long()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    keys = torch.where(flat < 0, num_experts, flat)
    return counts.scatter_add_(0, keys, torch.ones_like(keys))[:num_experts]


def rank_in_expert(experts: Tensor, num_experts: int) -> Tensor:
    """How many earlier pairs each pair's expert has, int64 in the shape of ``experts``.

    Pairs are in order of token, then choice. Undefined for ids below zero.
    """
    experts = experts.contiguous()
    counts = expert_counts(experts, num_experts)
    starts = counts.cumsum(0) - counts
    order = sort_by_expert(experts, num_experts, 1, _TILE)
    positions = order.positions.view(experts.shape).long()
    return positions - starts[experts.clamp(min=0)]


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Most pairs that an expert takes: ``factor`` times an even share (GShard, 2020)."""
    return math.ceil(factor * num_tokens * top_k / num_experts)


def drop_over_capacity(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """``experts`` with -1 in every pair beyond an expert's capacity; earlier tokens come first."""
    full = rank_in_expert(experts, num_experts) >= capacity
    return experts.masked_fill(full, -1)


class SyntheticRouter:
    """Random routing with a known skew, which may drift.

    The expert at place ``i`` of the ranking is chosen with a probability in proportion to
    ``1 / (i + 1) ** skew`` (Zipf; 0 is uniform), a token's experts without repetition (Gumbel top
    k). After each batch the scores behind the ranking move, so that the skew stays and the hot
    experts change. The same seed gives the same sequence of batches.

    Attributes:
        drift: share of a score's variance that is new after each batch, 0 to 1.
    """

    def __init__(
        self, num_experts: int, top_k: int, *, skew: float = 0.0, drift: float = 0.0, seed: int = 0
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise MoEError(f"top_k {top_k} is not between 1 and num_experts {num_experts}")
        if skew < 0 or not 0 <= drift <= 1:
            raise MoEError(f"skew {skew}, drift {drift}; expected skew ≥ 0 and drift in [0, 1]")
        self.num_experts, self.top_k, self.drift = num_experts, top_k, drift
        self._random = np.random.default_rng(seed)
        self._log_shares = -skew * np.log(np.arange(1, num_experts + 1))
        self._scores = self._random.standard_normal(num_experts)

    @property
    def popularity(self) -> np.ndarray:
        """Probability of each expert as a token's first draw, float64 [num_experts]."""
        shares = np.exp(self._ranked())
        return np.asarray(shares / shares.sum())

    def shift(self) -> None:
        """Other experts become the hot ones, at once."""
        self._scores = self._random.standard_normal(self.num_experts)

    def route(self, num_tokens: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The next batch: weights float32 and expert ids int64, [num_tokens, top_k]."""
        gumbel = self._random.gumbel(size=(num_tokens, self.num_experts))
        keys = gumbel + self._ranked()
        experts = np.argsort(-keys, axis=1, kind="stable")[:, : self.top_k]
        chosen = np.take_along_axis(keys, experts, axis=1)
        weights = np.exp(chosen - chosen.max(axis=1, keepdims=True, initial=-np.inf))
        weights /= weights.sum(axis=1, keepdims=True)
        fresh = self._random.standard_normal(self.num_experts)
        self._scores = math.sqrt(1 - self.drift) * self._scores + math.sqrt(self.drift) * fresh
        return (
            torch.from_numpy(weights.astype(np.float32)).to(device),
            torch.from_numpy(experts.astype(np.int64)).to(device),
        )

    def _ranked(self) -> np.ndarray:
        ranking = np.empty(self.num_experts, dtype=np.int64)
        ranking[np.argsort(-self._scores, kind="stable")] = np.arange(self.num_experts)
        return np.asarray(self._log_shares[ranking])


class RoutingTrace:
    """Expert ids that a model's layers chose, batch by batch, on the CPU."""

    def __init__(self, num_layers: int) -> None:
        self._batches: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def add(self, layer: int, experts: Tensor) -> None:
        """Keep a layer's choice, int64 [num_tokens, top_k]."""
        self._batches[layer].append(experts.detach().cpu())

    def experts(self, layer: int) -> Tensor:
        """All choices of a layer, int64 [num_tokens, top_k]."""
        if not self._batches[layer]:
            raise MoEError(f"layer {layer} has routed nothing: run the model inside the recording")
        return torch.cat(self._batches[layer])


@contextmanager
def record_routing(model: Transformer) -> Iterator[RoutingTrace]:
    """Record what every MoE layer of ``model`` chooses in the forwards inside the ``with``.

    Raises:
        MoEError: the model has no mixture-of-experts layer.
    """
    blocks = {i: b.mlp for i, b in enumerate(model.layers) if isinstance(b.mlp, MoEBlock)}
    if not blocks:
        raise MoEError(f"{model.source or 'the model'} has no mixture-of-experts layers")
    trace = RoutingTrace(len(model.layers))

    def watched(layer: int, block: MoEBlock, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = type(block).route(block, x)
        trace.add(layer, experts)
        return weights, experts

    for layer, block in blocks.items():
        # An attribute of the object hides the method until it is deleted.
        vars(block)["route"] = lambda x, i=layer, b=block: watched(i, b, x)
    try:
        yield trace
    finally:
        for block in blocks.values():
            del vars(block)["route"]
