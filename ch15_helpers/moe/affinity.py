"""Placement that knows the nodes: experts that work together share one, and popular ones have
copies where they are asked for.

The router's decisions stay as they are; only the node that serves a pair changes, and with it the
bytes between nodes. Loads of nodes are kept within a bound, because the best placement for the
network alone would put everything into one node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.balancing import pack
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.placement import EMPTY, ExpertPlacement
from ch15_helpers.moe.topology import Topology
from ch15_helpers.moe.traffic import count_links, network_bytes


def place_by_affinity(
    experts: Sequence[Tensor],
    num_experts: int,
    topology: Topology,
    slots_per_rank: int,
    max_node_load: float = 1.2,
) -> ExpertPlacement:
    """Fewer bytes between nodes for routing like the given one; never more for that one.

    Homes of experts are found by swaps (Kernighan and Lin, 1970) that raise the number of pairs
    served beside another pair of the same token, or at its source. Spare slots of a node then hold
    copies of foreign experts that its own tokens ask for and that keep company with what is there.
    Dispatch must use ``nearest_replica`` for that to help.

    Args:
        experts: int64 [num_tokens, top_k] of each rank's batch: what its router chose.
        slots_per_rank: more than ``num_experts / num_ranks`` leaves room for copies.
        max_node_load: bound of a node's load over the mean, in swaps.

    Raises:
        MoEError: too few slots, or batches for another number of ranks.
    """
    if len(experts) != topology.num_ranks:
        raise MoEError(f"{len(experts)} batches for {topology.num_ranks} ranks; expected one each")
    even = ExpertPlacement.even(num_experts, topology.num_ranks, slots_per_rank)
    asked = _asked(experts, num_experts, topology)
    homes = _homes(experts, asked, num_experts, topology, max_node_load)
    config = ExpertParallelConfig(ranks_per_node=topology.ranks_per_node, nearest_replica=True)
    top_k = experts[0].shape[1]

    def crossing(placement: ExpertPlacement) -> int:
        links = count_links(experts, placement, config, 1024, torch.bfloat16, top_k)
        return network_bytes(links, topology)[1]

    together = _together(experts, num_experts)
    spare = slots_per_rank * topology.ranks_per_node - int(np.bincount(homes).max())
    # A copy also draws pairs away from company that they had: all spare slots need not be best.
    rooms = sorted({0, spare // 4, spare // 2, spare})
    found = [_fill(homes, asked, together, topology, slots_per_rank, room) for room in rooms]
    return min([even, *found], key=crossing)


def _asked(experts: Sequence[Tensor], num_experts: int, topology: Topology) -> np.ndarray:
    """Pairs from each node for each expert, float64 [num_nodes, num_experts]."""
    asked = np.zeros((topology.num_nodes, num_experts))
    for rank, chosen in enumerate(experts):
        counts = torch.bincount(chosen.flatten(), minlength=num_experts)
        asked[topology.node_of(rank)] += counts.numpy()
    return asked


def _together(experts: Sequence[Tensor], num_experts: int) -> np.ndarray:
    """How often two experts serve the same token, float64 [num_experts, num_experts]."""
    chosen = torch.cat(list(experts)).numpy()
    together = np.zeros(num_experts * num_experts)
    for i in range(chosen.shape[1]):
        for j in range(chosen.shape[1]):
            if i != j:
                pairs = chosen[:, i] * num_experts + chosen[:, j]
                together += np.bincount(pairs, minlength=together.size)
    return together.reshape(num_experts, num_experts)


def _homes(
    experts: Sequence[Tensor],
    asked: np.ndarray,
    num_experts: int,
    topology: Topology,
    max_node_load: float,
) -> np.ndarray:
    """Node of each expert, int64 [num_experts]: balanced first, then improved by swaps."""
    num_nodes = topology.num_nodes
    padding = -num_experts % num_nodes  # experts that nobody asks for make nodes of equal size
    loads = np.append(asked.sum(0), np.zeros(padding))
    wanted = np.pad(asked, ((0, 0), (0, padding)))
    together = np.pad(_together(experts, num_experts), (0, padding))
    homes = np.empty(loads.size, dtype=np.int64)
    for node, items in enumerate(pack(loads.tolist(), num_nodes)):
        homes[items] = node
    node_loads = np.bincount(homes, loads, num_nodes)
    bound = max(float(node_loads.max()), max_node_load * float(loads.sum()) / num_nodes)
    for _ in range(4 * loads.size):
        inside = np.eye(num_nodes)[homes]  # [experts, nodes]
        affinity = together @ inside + wanted.T
        own = affinity[np.arange(loads.size), homes]
        there = affinity[:, homes]  # of expert a in the home of expert b
        gains = there + there.T - own[:, None] - own[None, :] - 2 * together
        change = loads[None, :] - loads[:, None]  # of a's node when a and b trade places
        fits = node_loads[homes][:, None] + change <= bound
        gains[~(fits & fits.T) | (homes[:, None] == homes[None, :])] = 0
        a, b = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[a, b] <= 0:
            break
        homes[a], homes[b] = homes[b], homes[a]
        node_loads = np.bincount(homes, loads, num_nodes)
    return homes[:num_experts]


def _fill(
    homes: np.ndarray,
    asked: np.ndarray,
    together: np.ndarray,
    topology: Topology,
    slots_per_rank: int,
    room: int,
) -> ExpertPlacement:
    """Experts at home, up to ``room`` foreign ones in each node, spread over its ranks."""
    num_experts = len(homes)
    node_slots = slots_per_rank * topology.ranks_per_node
    held = np.zeros((topology.num_nodes, num_experts), dtype=bool)
    held[homes, np.arange(num_experts)] = True
    for node in range(topology.num_nodes):
        for _ in range(min(room, node_slots - int(held[node].sum()))):
            # Pairs from here, and how often their tokens ask for what is here, too.
            scores = asked[node] + together @ held[node]
            scores[held[node] | (asked[node] == 0)] = -1.0
            if scores.max() < 0:
                break
            held[node, int(scores.argmax())] = True
    rows: list[tuple[int, ...]] = []
    for node in range(topology.num_nodes):
        local = np.where(held[node], asked[node], 0.0)
        # An expert also serves the nodes that hold no copy of it, at one of its places.
        rest = (asked * ~held).sum(0) / held.sum(0)
        loads = local + np.where(held[node], rest, 0.0)
        slots = [int(e) for e in np.flatnonzero(held[node])]
        slots += [EMPTY] * (node_slots - len(slots))
        weights = [0.0 if e == EMPTY else float(loads[e]) for e in slots]
        packed = pack(weights, topology.ranks_per_node)
        rows += [tuple(slots[i] for i in items) for items in packed]
    return ExpertPlacement(num_experts, tuple(rows))
