"""Two-batch overlap of a whole model: one batch's attention while the other's tokens travel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.linear import linear
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.model.moe import MoEBlock
from ch15_helpers.model.transformer import DecoderLayer, Transformer
from ch15_helpers.moe.expert_parallel import ExpertParallelBlock
from ch15_helpers.moe.overlap import OverlapLayer, forward_micro_batches


def overlap_layers(model: Transformer, length: int) -> list[OverlapLayer]:
    """The layers of a model after ``shard_experts``, for sequences of ``length`` tokens.

    Raises:
        MoEError: a layer's experts are not spread over ranks.
    """
    layers = []
    for layer in model.layers:
        block = layer.mlp
        if not isinstance(block, ExpertParallelBlock):
            raise MoEError("every layer needs expert parallelism: call shard_experts first")
        layers.append(OverlapLayer(partial(before_experts, model, layer, length), block.layer))
    return layers


@torch.inference_mode()
def forward_dense_overlapped(
    model: Transformer, batches: Sequence[Tensor], *, overlap: bool = True
) -> list[Tensor]:
    """``Transformer.forward_dense`` of micro-batches of sequences, all of one length.

    Args:
        batches: int64 [batch, length] each, as many on every rank.

    Returns:
        float32 [batch, length, vocab_size] each.
    """
    lengths = {ids.shape[1] for ids in batches}
    if len(lengths) != 1:
        raise MoEError(f"sequences of lengths {sorted(lengths)}; expected one length")
    hidden = [embedding(ids.flatten(), model.embed_tokens) for ids in batches]
    layers = overlap_layers(model, lengths.pop())
    eps = model.config.rms_norm_eps
    return [
        model.compute_logits(rms_norm(out, model.final_norm, eps)).view(*ids.shape, -1)
        for ids, out in zip(
            batches, forward_micro_batches(layers, hidden, overlap=overlap), strict=True
        )
    ]


def before_experts(
    model: Transformer, layer: DecoderLayer, length: int, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, norm and router: see ``OverlapLayer.before``."""
    eps, rows = model.config.rms_norm_eps, len(residual) // length
    positions = torch.arange(length, device=model.device).repeat(rows)
    x = rms_norm(residual, layer.input_norm, eps)
    parts = layer.project_qkv(x, positions, model.cos_sin_cache)
    q, k, v = (t.view(rows, length, *t.shape[1:]).transpose(1, 2) for t in parts)
    mixed = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=model.scale, enable_gqa=True
    )
    mixed = mixed.transpose(1, 2).reshape(len(residual), -1)
    residual = residual + linear(mixed, layer.o_proj, layer.o_bias)
    x = rms_norm(residual, layer.post_attention_norm, eps)
    assert isinstance(layer.mlp, MoEBlock)
    return residual, x, *layer.mlp.route(x)
