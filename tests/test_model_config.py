"""Configurations: presets, arithmetic on them, and what random models are."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from ch15_helpers import ModelConfig, load_model
from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.config import (
    LLAMA3_8B,
    MIXTRAL_8X7B,
    PRESETS,
    QWEN3_30B_A3B,
    Llama3RopeScaling,
)
from ch15_helpers.model.transformer import Transformer


def test_published_parameter_counts() -> None:
    """The model cards' numbers, exact ones counted from the checkpoints."""
    assert LLAMA3_8B.num_parameters() == 8_030_261_248
    assert MIXTRAL_8X7B.num_parameters() == 46_702_792_704
    assert QWEN3_30B_A3B.num_parameters() == 30_532_122_624
    assert QWEN3_30B_A3B.num_parameters(active_only=True) == pytest.approx(3.3e9, rel=0.02)
    assert MIXTRAL_8X7B.num_parameters(active_only=True) == pytest.approx(12.9e9, rel=0.01)


def test_kv_bytes_per_token() -> None:
    assert LLAMA3_8B.kv_bytes_per_token(2) == 131_072
    assert LLAMA3_8B.kv_bytes_per_token(2) * 16 == 2 * 2**20  # DESIGN: 2 MiB a block of 16
    assert QWEN3_30B_A3B.kv_bytes_per_token(2) == 2 * 48 * 4 * 128 * 2


@pytest.mark.parametrize("name", ["TINY", "TINY_MOE"])
def test_counted_parameters_are_the_allocated_ones(name: str) -> None:
    model = load_model(f"random:{name}", "cpu")
    assert sum(w.numel() for _, w in model.named_weights()) == model.config.num_parameters()
    assert model.source == f"random:{name}"


def test_frozen_and_checked() -> None:
    with pytest.raises(FrozenInstanceError):
        LLAMA3_8B.hidden_size = 1  # type: ignore[misc]
    with pytest.raises(ModelLoadError, match="num_experts_per_tok 9 is not between"):
        replace(PRESETS["TINY_MOE"], num_experts_per_tok=9)
    with pytest.raises(ModelLoadError, match="head_dim 15 is odd"):
        replace(PRESETS["TINY"], head_dim=15)


def test_from_hf_reads_old_and_new_rope_fields() -> None:
    """Llama-3.1-8B's config.json as published, and as transformers 5 rewrites it."""
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    fields = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
    }
    old = ModelConfig.from_hf(fields | {"rope_theta": 500000.0, "rope_scaling": scaling})
    new = ModelConfig.from_hf(fields | {"rope_parameters": scaling | {"rope_theta": 500000.0}})
    assert old == new
    assert old.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    assert old.head_dim == 128
    assert old.eos_token_ids == (128001, 128008, 128009)
    assert not old.tie_word_embeddings
    assert (
        replace(
            old, max_position_embeddings=8192, rope_scaling=None, eos_token_ids=(128001, 128009)
        )
        == LLAMA3_8B
    )


def test_random_models_are_seeded(device: str) -> None:
    first, again = (load_model("random:TINY", device, torch.float32) for _ in range(2))
    other = load_model("random:TINY", device, torch.float32, seed=1)
    for (name, a), (_, b), (_, c) in zip(
        first.named_weights(), again.named_weights(), other.named_weights(), strict=True
    ):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c), name


def test_random_models_are_not_degenerate(tiny: Transformer, tiny_moe: Transformer) -> None:
    """Greedy continuations differ between prompts and do not repeat one token."""
    for model in (tiny, tiny_moe):
        outputs = []
        for prompt in ([1, 2, 3], [1, 2, 4], [9, 2, 3]):
            ids = torch.tensor([prompt], device=model.device)
            for _ in range(12):
                token = model.forward_dense(ids)[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat((ids, token), dim=1)
            outputs.append(tuple(ids[0, 3:].tolist()))
        assert len(set(outputs)) == 3
        assert all(len(set(output)) > 4 for output in outputs)


def test_moe_routes_as_published(tiny_moe: Transformer) -> None:
    """Softmax over all experts, then the top k, then normalised (or not) to sum to one."""
    from ch15_helpers.model.moe import MoEBlock

    block = tiny_moe.layers[0].mlp
    assert isinstance(block, MoEBlock)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(tiny_moe.device)
    weights, experts = block.route(x)
    scores = (x.double() @ block.router.double().T).softmax(-1)
    for token in range(20):
        ranked = sorted(range(8), key=lambda e: -float(scores[token, e]))[:2]
        assert experts[token].tolist() == ranked
        top = scores[token, ranked]
        assert weights[token].tolist() == pytest.approx((top / top.sum()).tolist(), rel=1e-5)
    plain = MoEBlock(replace(block.config, norm_topk_prob=False), x.device, x.dtype)
    plain.router = block.router
    assert plain.route(x)[0].sum(-1).max() < 0.999
