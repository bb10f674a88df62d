"""Experts of one rank, and three ways to run them, from the loop to grouped products.

:func:`experts_loop` is what everybody writes first (transformers' eager block); it is fair: it
visits only experts in use and indexes once for each. :func:`experts_sorted` sorts once, so that
an expert's rows lie side by side. ``fused_moe`` does the same in grouped products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.fused_moe import fused_moe
from ch15_helpers.kernels.linear import linear
from ch15_helpers.kernels.swiglu import swiglu
from ch15_helpers.moe.placement import EMPTY, ExpertPlacement
from ch15_helpers.moe.routing import expert_counts


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of some experts, in order of slot.

    Attributes:
        gate_up: [num_slots, 2 * inner, hidden], gate rows first.
        down: [num_slots, hidden, inner].
        scales: of both when they are FP8, see ``kernels.moe_fp8``.
    """

    gate_up: Tensor
    down: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        slots, hidden, inner = self.down.shape
        if tuple(self.gate_up.shape) != (slots, 2 * inner, hidden):
            raise MoEError(
                f"gate_up is {tuple(self.gate_up.shape)} and down {tuple(self.down.shape)}; "
                f"expected gate_up {(slots, 2 * inner, hidden)}"
            )

    @property
    def hidden_size(self) -> int:
        return int(self.down.shape[1])

    @property
    def bytes_per_expert(self) -> int:
        """Bytes that moving one expert takes."""
        parts = (self.gate_up, self.down, *(self.scales or ()))
        return sum(part[0].nbytes for part in parts)

    def of_slots(self, experts: Sequence[int]) -> ExpertWeights:
        """A copy with only the given experts, one for each slot; an empty slot holds zeros."""
        index = torch.tensor([max(0, e) for e in experts], device=self.down.device)
        # Bytes are gathered as integers: torch has no indexing of FP8 on every device.
        parts = [
            part.view(torch.uint8)[index].view(part.dtype)
            for part in (self.gate_up, self.down, *(self.scales or ()))
        ]
        for slot, expert in enumerate(experts):
            if expert == EMPTY:
                for part in parts:
                    part[slot].view(torch.uint8).zero_()
        scales = (parts[2], parts[3]) if self.scales is not None else None
        return ExpertWeights(parts[0], parts[1], scales)

    def of_rank(self, placement: ExpertPlacement, rank: int) -> ExpertWeights:
        """What ``rank`` holds of these, which are all experts of a layer."""
        if self.down.shape[0] != placement.num_experts:
            raise MoEError(
                f"{self.down.shape[0]} experts are given, {placement.num_experts} are placed"
            )
        return self.of_slots(placement.slots[rank])

    def __call__(self, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        """``sum_j weights[t, j] * expert_{slots[t, j]}(x[t])``; ids outside add nothing."""
        return fused_moe(x, self.gate_up, self.down, weights, slots, self.scales)


class SharedExpert:
    """The expert that every token visits (DeepSeek-V2, 2024), in two halves for overlap.

    Attributes:
        gate_up: [2 * inner, hidden]. down: [hidden, inner].
    """

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up, down

    def first(self, x: Tensor) -> Tensor:
        """[N, hidden] to [N, inner]: two thirds of the work."""
        return swiglu(linear(x, self.gate_up))

    def second(self, inner: Tensor) -> Tensor:
        """[N, inner] to [N, hidden]."""
        return linear(inner, self.down)

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def experts_loop(x: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    """One expert after the other, its tokens picked by comparison: the fair baseline.

    Arguments and result are those of ``ExpertWeights.__call__``.
    """
    out = torch.zeros_like(x)
    for expert in torch.unique(ids).tolist():
        if not 0 <= expert < experts.down.shape[0]:
            continue
        tokens, choice = torch.where(ids == expert)
        y = _one_expert(x[tokens], experts, expert)
        out.index_add_(0, tokens, (weights[tokens, choice, None] * y).to(x.dtype))
    return out


def experts_sorted(x: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorted once by expert: each expert's rows are a slice, results are put back in one go."""
    num_experts, top_k = experts.down.shape[0], ids.shape[1]
    flat = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids).flatten()
    order = flat.argsort(stable=True)
    tokens = order.div(top_k, rounding_mode="floor")
    rows, y = x[tokens], x.new_zeros(order.shape[0], x.shape[1])
    start = 0
    for expert, count in enumerate(expert_counts(flat, num_experts + 1).tolist()[:-1]):
        if count:
            y[start : start + count] = _one_expert(rows[start : start + count], experts, expert)
        start += count
    y *= weights.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add_(0, tokens[:start], y[:start])


def _one_expert(rows: Tensor, experts: ExpertWeights, expert: int) -> Tensor:
    gate, up = linear(rows, experts.gate_up[expert]).chunk(2, -1)
    return linear(silu(gate) * up, experts.down[expert])
