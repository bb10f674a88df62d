"""Two-level dispatch: between nodes first, then inside the node, so that slow links carry less.

A token with experts on three ranks of another node crosses the network once: it goes to the rank
of that node with the same place as its own (its *gateway*), which copies it to its neighbours;
their sums are added at the gateway, and one row comes back (DeepSeek-V3, 2024; DeepEP, 2025).
Crossing first is what makes that possible: inside first, the node would have to send one row for
each of the three ranks. The price is a second hop with its own counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.dispatch import Dispatcher, Exchange, Link, Pending
from ch15_helpers.moe.expert_parallel import (
    ExpertParallel,
    ExpertParallelConfig,
    activation_dtype,
    wire_format,
)
from ch15_helpers.moe.experts import ExpertWeights
from ch15_helpers.moe.modelled_link import ModelledLink
from ch15_helpers.moe.placement import ExpertPlacement


@dataclass(frozen=True)
class Topology:
    """Nodes of consecutive ranks.

    Attributes:
        num_ranks: of all nodes. ranks_per_node: ranks behind one fast switch.
    """

    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.num_ranks < 1 or self.num_ranks % self.ranks_per_node:
            raise MoEError(
                f"{self.num_ranks} ranks do not make nodes of {self.ranks_per_node}; expected a "
                "number of ranks that is a multiple of ranks_per_node"
            )

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def gateway(self, rank: int, node: int) -> int:
        """The rank of ``node`` that takes what ``rank`` sends there."""
        return node * self.ranks_per_node + rank % self.ranks_per_node

    def crosses(self, source: int, target: int) -> bool:
        """Whether a message between two ranks leaves its node."""
        return self.node_of(source) != self.node_of(target)


@dataclass(frozen=True)
class NodeGroups:
    """The process groups of a rank: its peers in other nodes, and its node."""

    across: Any
    inside: Any


def make_node_groups(ranks_per_node: int, group: Any = None) -> NodeGroups:
    """Make both groups; every rank of ``group`` must call it. Layers share what it returns."""
    ranks = Exchange(group).ranks
    topology = Topology(len(ranks), ranks_per_node)
    me = ranks.index(dist.get_rank())
    place, node = me % ranks_per_node, topology.node_of(me)
    inside = ranks[node * ranks_per_node : (node + 1) * ranks_per_node]
    across = ranks[place::ranks_per_node]
    return NodeGroups(
        dist.new_group(across, use_local_synchronization=True),
        dist.new_group(inside, use_local_synchronization=True),
    )


class HierarchicalExpertParallel(ExpertParallel):
    """:class:`ExpertParallel` in two levels, with the same results and phases.

    The first level is what ``start_dispatch`` and ``start_combine`` start; the second happens
    inside ``compute``.
    """

    def __init__(
        self,
        experts: ExpertWeights,
        placement: ExpertPlacement,
        top_k: int,
        config: ExpertParallelConfig,
        group: Any = None,
        node_groups: NodeGroups | None = None,
    ) -> None:
        if config.ranks_per_node is None:
            raise MoEError("two-level dispatch needs ranks_per_node")
        super().__init__(experts, placement, top_k, config, group)
        groups = node_groups or make_node_groups(config.ranks_per_node, group)
        self._across = Exchange(groups.across, level=" across")
        self._inside = Exchange(groups.inside, level=" inside")
        dtype = activation_dtype(experts)
        wire = wire_format(experts.hidden_size, dtype, top_k, config)
        back = config.combine_dtype or dtype
        size, dedup = placement.slots_per_rank, config.deduplicate
        node_size = size * config.ranks_per_node
        most = config.max_tokens
        arriving = most and most * self._across.size
        self._dispatcher = Dispatcher(self._across, node_size, wire, back, dedup, most)
        self._second = Dispatcher(self._inside, size, wire, back, dedup, arriving)

    @property
    def link_bytes(self) -> Counter[Link]:
        return self._across.link_bytes + self._inside.link_bytes

    def model_link(self, link: ModelledLink | None) -> None:
        self._across.link = self._inside.link = link

    def compute(self, arrived: Pending, dtype: torch.dtype) -> Tensor:
        """Spread what arrived inside the node, run it, and add up the node's results."""
        if self._inside.size == 1:  # a node of one rank has nobody to spread it to
            return super().compute(arrived, dtype)
        x, weights, slots = self._dispatcher.unpack(arrived.wait(), dtype)
        (trip,) = self._second.plan([(weights, slots)])
        here = self._second.start_dispatch(x, trip).wait()
        results = self.experts(*self._second.unpack(here, dtype))
        returned = self._second.start_combine(results, trip).wait()
        # Sums of a node travel on in the combine's type: no more is kept than will be sent.
        return self._second.finish(returned, trip, dtype)


def make_expert_parallel(
    experts: ExpertWeights,
    placement: ExpertPlacement,
    top_k: int,
    config: ExpertParallelConfig | None = None,
    group: Any = None,
    node_groups: NodeGroups | None = None,
) -> ExpertParallel:
    """Expert parallelism in one level, or in two where ``config.ranks_per_node`` makes nodes."""
    config = config or ExpertParallelConfig()
    if config.ranks_per_node is None:
        return ExpertParallel(experts, placement, top_k, config, group)
    return HierarchicalExpertParallel(experts, placement, top_k, config, group, node_groups)
