"""Where experts live: each rank has the same number of slots, an expert one slot or more.

A router names experts; a placement says which slot serves each (token, expert) pair. Replicas hold
the same weights, so the choice between them changes where work is done and not its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.routing import rank_in_expert

EMPTY = -1


@dataclass(frozen=True)
class ExpertPlacement:
    """Experts of each rank's slots.

    Slot ``rank * slots_per_rank + i`` is slot ``i`` of ``rank``.

    Attributes:
        num_experts: of the layer.
        slots: ids [num_ranks][slots_per_rank]; -1 is an empty slot.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.slots or len({len(row) for row in self.slots}) != 1 or not self.slots[0]:
            raise MoEError("a placement needs the same positive number of slots on every rank")
        held = {expert for row in self.slots for expert in row} - {EMPTY}
        missing = sorted(set(range(self.num_experts)) - held)
        unknown = sorted(held - set(range(self.num_experts)))
        if missing or unknown:
            raise MoEError(
                f"placement of {self.num_experts} experts: missing {missing[:8]}, "
                f"unknown {unknown[:8]}; every expert needs at least one slot"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots[0])

    @property
    def replicas(self) -> list[list[int]]:
        """Slots of each expert, ascending: [num_experts][1 or more]."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(e for row in self.slots for e in row):
            if expert != EMPTY:
                found[expert].append(slot)
        return found

    @classmethod
    def even(
        cls, num_experts: int, num_ranks: int, slots_per_rank: int | None = None
    ) -> ExpertPlacement:
        """Consecutive experts on consecutive ranks; slots that are left over stay empty."""
        size = slots_per_rank or -(-num_experts // num_ranks)
        if size * num_ranks < num_experts:
            raise MoEError(
                f"{num_ranks} ranks of {size} slots cannot hold {num_experts} experts; expected "
                f"at least {-(-num_experts // num_ranks)} slots on each"
            )
        # Ranks differ by one expert at most, so that none stays empty while others are full.
        base, rest = divmod(num_experts, num_ranks)
        rows, first = [], 0
        for rank in range(num_ranks):
            count = base + (rank < rest)
            filled = range(first, first + count)
            rows.append((*filled, *[EMPTY] * (size - count)))
            first += count
        return cls(num_experts, tuple(rows))


class SlotChooser:
    """Slots for the pairs of one rank: a small table, applied without a word to the host.

    An expert's uses on a rank go round its replicas, so that their shares differ by one at most.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        rank: int,
        *,
        ranks_per_node: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """With ``ranks_per_node`` only the nearest replicas are used: own rank's, node's, or those
        of the next node that has one, so that experts with the same nodes stay together."""
        self.num_experts, self._rank = placement.num_experts, rank
        size = placement.slots_per_rank
        usable = placement.replicas
        if ranks_per_node:
            num_nodes = -(-placement.num_ranks // ranks_per_node)
            usable = [_nearest(s, rank, size, ranks_per_node, num_nodes) for s in usable]
        width = max(len(slots) for slots in usable)
        padded = [slots + slots[:1] * (width - len(slots)) for slots in usable]
        self._table = torch.tensor(padded, device=device)
        # The even placement, where nothing is left over: an expert's number is its slot.
        self._is_identity = padded == [[expert] for expert in range(self.num_experts)]
        self._counts = torch.tensor([len(slots) for slots in usable], device=device)

    def __call__(self, experts: Tensor) -> Tensor:
        """Global slots, int64 in the shape of ``experts``; -1 stays -1."""
        if self._is_identity:
            return experts
        known = experts.clamp(min=0)
        if self._table.shape[1] == 1:
            slots = self._table[known, 0]
        else:
            turn = rank_in_expert(experts, self.num_experts) + self._rank
            slots = self._table[known, turn.remainder(self._counts[known])]
        return torch.where(experts < 0, -1, slots)


def _nearest(
    slots: Sequence[int], rank: int, size: int, ranks_per_node: int, num_nodes: int
) -> list[int]:
    node, per_node = rank // ranks_per_node, size * ranks_per_node
    here = [slot for slot in slots if slot // size == rank]
    steps = [(slot // per_node - node) % num_nodes for slot in slots]
    nearest = [slot for slot, step in zip(slots, steps, strict=True) if step == min(steps)]
    return here or nearest
