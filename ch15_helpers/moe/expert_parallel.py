"""Expert parallelism: each rank holds some experts and serves the tokens of all ranks.

``ExpertParallel`` has the shape of the block that it replaces: [N, hidden] and a routing in,
[N, hidden] out, equal to what one rank with all experts computes. Each rank brings its own tokens
(data parallel), perhaps none; all ranks must call it together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.moe_fp8 import FP8
from ch15_helpers.model.moe import MoEBlock
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.moe.dispatch import Dispatcher, Exchange, Link, Pending, Trip
from ch15_helpers.moe.experts import ExpertWeights
from ch15_helpers.moe.modelled_link import ModelledLink
from ch15_helpers.moe.placement import ExpertPlacement, SlotChooser
from ch15_helpers.moe.routing import drop_over_capacity, expert_capacity
from ch15_helpers.moe.wire import WireFormat


@dataclass(frozen=True)
class ExpertParallelConfig:
    """How tokens travel.

    Attributes:
        fp8_dispatch: hidden states go out in E4M3, one scale for each 128 numbers.
        combine_dtype: of results on their way back; None keeps the model's.
        deduplicate: a token goes to a rank once, with all its experts there.
        capacity_factor: most pairs of an expert from one rank, in even shares; pairs beyond it
            are dropped, which bounds every buffer. None drops nothing.
        max_tokens: of a batch on any rank. Messages then have a fixed size, padded, and counts need
            not be traded: more bytes, less waiting, as in DeepEP's low-latency mode.
        ranks_per_node: two-level dispatch through nodes of this many consecutive ranks.
        nearest_replica: use only the nearest replicas of an expert instead of all in turn.
    """

    fp8_dispatch: bool = False
    combine_dtype: torch.dtype | None = None
    deduplicate: bool = True
    capacity_factor: float | None = None
    max_tokens: int | None = None
    ranks_per_node: int | None = None
    nearest_replica: bool = False

    def __post_init__(self) -> None:
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise MoEError(f"capacity_factor is {self.capacity_factor}; expected above 0 or None")
        if self.max_tokens is not None and not (self.max_tokens >= 1 and self.deduplicate):
            raise MoEError(
                f"max_tokens is {self.max_tokens}; expected 1 or more, with deduplicate, which "
                "bounds the copies of a token for one rank"
            )
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise MoEError(f"ranks_per_node is {self.ranks_per_node}; expected 1 or more, or None")
        if self.nearest_replica and self.ranks_per_node is None:
            raise MoEError("nearest_replica needs ranks_per_node, which says what is near")


class ExpertParallel:
    """One layer's experts over the ranks of a group, in one level.

    Args:
        experts: this rank's, in the order of its slots.
        placement: of the whole layer, the same on every rank.
        top_k: experts of a token.

    Attributes:
        dropped: int64 [], pairs dropped by the last plan for want of capacity.
    """

    def __init__(
        self,
        experts: ExpertWeights,
        placement: ExpertPlacement,
        top_k: int,
        config: ExpertParallelConfig | None = None,
        group: Any = None,
    ) -> None:
        self.config = config or ExpertParallelConfig()
        self.experts, self.placement = experts, placement
        self.exchange = Exchange(group)
        _check(experts, placement, self.exchange)
        dtype = activation_dtype(experts)
        device = experts.down.device
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)
        self._choose = self._chooser()
        self._dispatcher = Dispatcher(
            self.exchange,
            placement.slots_per_rank,
            wire_format(experts.hidden_size, dtype, top_k, self.config),
            self.config.combine_dtype or dtype,
            self.config.deduplicate,
            self.config.max_tokens,
        )

    @property
    def link_bytes(self) -> Counter[Link]:
        """Bytes that this rank has sent over each link since it was made."""
        return Counter(self.exchange.link_bytes)

    def model_link(self, link: ModelledLink | None) -> None:
        """Hold back what arrives as ``link`` would, from now on; None stops that."""
        self.exchange.link = link

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on its way back, and on its way out."""
        return self._dispatcher.row_bytes

    def plan(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Trip]:
        """Agree with the other ranks on the copies of some batches: (weights, experts) of each."""
        chosen = []
        if self.config.capacity_factor is not None:
            self.dropped.zero_()
        for weights, experts in batches:
            kept = self._limit(experts)
            chosen.append((weights, self._choose(kept)))
        return self._dispatcher.plan(chosen)

    def start_dispatch(self, x: Tensor, trip: Trip) -> Pending:
        """Send [N, hidden] on its way; the result goes to :meth:`compute`."""
        return self._dispatcher.start_dispatch(x, trip)

    def compute(self, arrived: Pending, dtype: torch.dtype) -> Tensor:
        """Wait for tokens and run them through this rank's experts: [R, hidden]."""
        return self.experts(*self._dispatcher.unpack(arrived.wait(), dtype))

    def start_combine(self, results: Tensor, trip: Trip) -> Pending:
        """Send results back; what returns goes to :meth:`finish`."""
        return self._dispatcher.start_combine(results, trip)

    def finish(self, returned: Pending, trip: Trip, dtype: torch.dtype) -> Tensor:
        """[N, hidden] of this rank's tokens."""
        return self._dispatcher.finish(returned.wait(), trip, dtype)

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The whole way, one phase after the other.

        Args:
            x: [N, hidden]. weights: float32 [N, top_k]. experts: int64 [N, top_k].
        """
        (trip,) = self.plan([(weights, experts)])
        results = self.compute(self.start_dispatch(x, trip), x.dtype)
        return self.finish(self.start_combine(results, trip), trip, x.dtype)

    def adopt(self, experts: ExpertWeights, placement: ExpertPlacement) -> None:
        """Serve from another placement, whose weights are there already; see ``rebalance``."""
        if placement.slots_per_rank != self.placement.slots_per_rank:
            raise MoEError(
                f"the new placement has {placement.slots_per_rank} slots on a rank, buffers are "
                f"made for {self.placement.slots_per_rank}"
            )
        _check(experts, placement, self.exchange)
        self.experts, self.placement = experts, placement
        self._choose = self._chooser()

    def _chooser(self) -> SlotChooser:
        near = self.config.ranks_per_node if self.config.nearest_replica else None
        rank, device = self.exchange.rank, self.experts.down.device
        return SlotChooser(self.placement, rank, ranks_per_node=near, device=device)

    def _limit(self, experts: Tensor) -> Tensor:
        factor = self.config.capacity_factor
        if factor is None:
            return experts
        num_experts = self.placement.num_experts
        num_tokens, top_k = experts.shape
        capacity = expert_capacity(num_tokens, top_k, num_experts, factor)
        kept = drop_over_capacity(experts, num_experts, capacity)
        self.dropped += (kept < 0).sum()
        return kept


def activation_dtype(experts: ExpertWeights) -> torch.dtype:
    """Type of hidden states beside these weights: bfloat16 where the weights are FP8."""
    return torch.bfloat16 if experts.scales is not None else experts.down.dtype


def wire_format(
    hidden: int, dtype: torch.dtype, top_k: int, config: ExpertParallelConfig
) -> WireFormat:
    """Layout of the rows that ``config`` asks for."""
    entries = top_k if config.deduplicate else 1
    return WireFormat(hidden, FP8 if config.fp8_dispatch else dtype, entries)


def _check(experts: ExpertWeights, placement: ExpertPlacement, exchange: Exchange) -> None:
    if placement.num_ranks != exchange.size:
        raise MoEError(
            f"the placement is for {placement.num_ranks} ranks, the group has {exchange.size}"
        )
    if experts.down.shape[0] != placement.slots_per_rank:
        raise MoEError(
            f"rank {exchange.rank} holds {experts.down.shape[0]} experts, the placement gives "
            f"it {placement.slots_per_rank} slots: cut them out with ExpertWeights.of_rank"
        )


class ExpertParallelBlock(MoEBlock):
    """A model's MoE block whose experts live on many ranks; its router stays on all of them."""

    can_capture = False  # message sizes go through the host

    def __init__(self, block: MoEBlock, layer: Any) -> None:
        self.config, self.router, self.layer = block.config, block.router, layer

    def __call__(self, x: Tensor) -> Tensor:
        """[N, hidden] to [N, hidden]; all ranks must run the layer together."""
        out: Tensor = self.layer(x, *self.route(x))
        return out


def shard_experts(
    model: Transformer,
    placement: ExpertPlacement,
    config: ExpertParallelConfig | None = None,
    group: Any = None,
) -> None:
    """Replace the MoE blocks of ``model``, which holds all weights, by this rank's share of them.

    Raises:
        MoEError: the model has no MoE blocks, or the placement does not fit them.
    """
    from ch15_helpers.moe.topology import make_expert_parallel, make_node_groups

    blocks = [layer for layer in model.layers if isinstance(layer.mlp, MoEBlock)]
    if not blocks:
        raise MoEError(f"{model.source or 'the model'} has no mixture-of-experts layers")
    rank = Exchange(group).rank
    size = config.ranks_per_node if config else None
    groups = make_node_groups(size, group) if size else None
    for layer in blocks:
        block = layer.mlp
        assert isinstance(block, MoEBlock)
        own = ExpertWeights(block.gate_up_proj, block.down_proj).of_rank(placement, rank)
        top_k = model.config.num_experts_per_tok
        parallel = make_expert_parallel(own, placement, top_k, config, group, groups)
        layer.mlp = ExpertParallelBlock(block, parallel)
