"""The mixture-of-experts block: a router, and the experts that it sends each token to.

Routing is Mixtral's (Jiang et al., 2024): softmax over all experts, the top k of them, and their
weights normalised to sum to one unless the configuration says otherwise (Qwen3-MoE may).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ch15_helpers.kernels.fused_moe import can_fuse, fused_moe
from ch15_helpers.kernels.linear import linear
from ch15_helpers.kernels.moe_route import route_topk
from ch15_helpers.model.config import ModelConfig


class MoEBlock:
    """Router and experts.

    Attributes:
        router: [num_experts, hidden].
        gate_up_proj: [num_experts, 2 * moe_intermediate, hidden], gate rows first.
        down_proj: [num_experts, hidden, moe_intermediate].
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        experts, hidden = config.num_experts, config.hidden_size
        inner = config.moe_intermediate_size
        self.router = torch.empty(experts, hidden, device=device, dtype=dtype)
        self.gate_up_proj = torch.empty(experts, 2 * inner, hidden, device=device, dtype=dtype)
        self.down_proj = torch.empty(experts, hidden, inner, device=device, dtype=dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to, and with what weight.

        Args:
            x: [N, hidden].

        Returns:
            weights float32 [N, k] and expert indices int64 [N, k].
        """
        logits = linear(x, self.router)
        return route_topk(logits, self.config.num_experts_per_tok, self.config.norm_topk_prob)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        weights, experts = self.route(x)
        return fused_moe(x, self.gate_up_proj, self.down_proj, weights, experts)

    @property
    def can_capture(self) -> bool:
        """Whether the block runs without a word from the host: see :func:`can_fuse`.

        A router that is watched (an attribute hides the method) reports to the host.
        """
        weight = self.down_proj
        fuses = can_fuse(weight.device, weight.dtype, *weight.shape[1:])
        return fuses and "route" not in vars(self)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names below ``model.layers.i.`` and the views that hold them."""
        mixtral = self.config.architecture == "mixtral"
        block = "block_sparse_moe" if mixtral else "mlp"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        yield f"{block}.gate.weight", self.router
        for expert in range(self.config.num_experts):
            gate_rows, up_rows = self.gate_up_proj[expert].chunk(2)
            prefix = f"{block}.experts.{expert}"
            yield f"{prefix}.{gate}.weight", gate_rows
            yield f"{prefix}.{up}.weight", up_rows
            yield f"{prefix}.{down}.weight", self.down_proj[expert]
