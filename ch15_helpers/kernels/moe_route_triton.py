# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Softmax, top k and normalisation of router logits in one kernel: a warp for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 4  # of one program, as many as it has warps


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr, weights_ptr, experts_ptr, num_tokens, stride,
    E: tl.constexpr, E_PAD: tl.constexpr, TOP_K: tl.constexpr, K_PAD: tl.constexpr,
    NORMALISE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)
    present = (token < num_tokens)[:, None] & (expert < E)[None, :]
    rows = logits_ptr + token.to(tl.int64)[:, None] * stride + expert[None, :]
    logits = tl.load(rows, mask=present, other=float("-inf")).to(tl.float32)
    highest = tl.max(logits, 1)
    total = tl.sum(tl.where(present, tl.exp(logits - highest[:, None]), 0.0), 1)
    # A NaN is chosen last, so that the choice is always k distinct experts.
    key = tl.where(logits == logits, logits, float("-inf"))
    free = tl.broadcast_to((expert < E)[None, :], (TOKENS, E_PAD))
    choice = tl.arange(0, K_PAD)
    ids = tl.zeros([TOKENS, K_PAD], tl.int64)
    weights = tl.zeros([TOKENS, K_PAD], tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, key, float("-inf")), 1)
        first = tl.where(free & (key == best[:, None]), expert[None, :], E_PAD)
        chosen = tl.min(first, 1)
        free = free & (expert[None, :] != chosen[:, None])
        here = (choice == j)[None, :]
        ids = tl.where(here, chosen[:, None].to(tl.int64), ids)
        weights = tl.where(here, tl.exp(best - highest)[:, None], weights)
    # Not-a-number in any logit reaches the total, and through it every weight of its token.
    scale = tl.sum(weights, 1) + (total - total) if NORMALISE else total
    out = token[:, None] * TOP_K + choice[None, :]
    mask = (token < num_tokens)[:, None] & (choice < TOP_K)[None, :]
    tl.store(weights_ptr + out, weights / scale[:, None], mask=mask)
    tl.store(experts_ptr + out, ids, mask=mask)


def route_topk_triton(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ch15_helpers.kernels.moe_route.route_topk`."""
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    experts = logits.new_empty((num_tokens, top_k), dtype=torch.int64)
    _route_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
        logits, weights, experts, num_tokens, logits.stride(0), num_experts,
        triton.next_power_of_2(num_experts), top_k, triton.next_power_of_2(top_k), normalise,
        _TOKENS, num_warps=_TOKENS,
    )  # fmt: skip
    return weights, experts
