"""Which experts a token goes to: softmax over all of them, the top k, their weights.

Mixtral's router (Jiang et al., 2024), and Qwen3-MoE's, which may leave the weights as they are.
Five small operations in torch; one kernel on CUDA, where each would take longer to launch than to
run.
"""

from __future__ import annotations

from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton


def route_topk(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of each token, most probable first.

    Args:
        logits: [num_tokens, num_experts].
        normalise: whether the chosen weights are scaled to add up to one.

    Returns:
        weights float32 and expert indices int64, both [num_tokens, top_k]. Indices of one token
        are distinct, also between ties, and always valid; a NaN logit makes its weights NaN.
    """
    if logits.shape[0] and use_triton(logits):
        from ch15_helpers.kernels.moe_route_triton import route_topk_triton

        return route_topk_triton(logits, top_k, normalise)
    scores = logits.float().softmax(dim=-1)
    weights, experts = scores.topk(top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True) if normalise else weights, experts
