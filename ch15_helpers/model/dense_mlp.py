"""The feed-forward block of a dense layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ch15_helpers.kernels.linear import gated_linear, linear
from ch15_helpers.kernels.linear_cpu import unpack_weight
from ch15_helpers.model.config import ModelConfig


class DenseMLP:
    """Feed-forward block: ``down(silu(gate(x)) * up(x))``, with gate and up in one weight.

    Attributes:
        gate_up_proj: [2 * intermediate, hidden], gate rows first.
        down_proj: [hidden, intermediate].
        can_capture: nothing in it waits for the host, so that a CUDA graph may hold it.
    """

    can_capture = True

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        new = partial(torch.empty, device=device, dtype=dtype)
        inner, hidden = config.intermediate_size, config.hidden_size
        self.gate_up_proj = new(2 * inner, hidden)
        self.down_proj = new(hidden, inner)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        return linear(gated_linear(x, self.gate_up_proj), self.down_proj)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names below ``model.layers.i.`` and the views that hold them."""
        gate, up = unpack_weight(self.gate_up_proj).chunk(2)
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", unpack_weight(self.down_proj)
