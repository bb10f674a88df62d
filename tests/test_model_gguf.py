"""GGUF files of every architecture, written with the gguf package, and broken ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ch15_helpers import load_model
from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.config import TINY, TINY_MOE, ModelConfig
from ch15_helpers.model.gguf_file import GGUFFile
from ch15_helpers.model.transformer import Transformer

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT = {
    "gate_proj": "ffn_gate_exps",
    "w1": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "w3": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w2": "ffn_down_exps",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONFIGS: dict[str, ModelConfig] = {
    "llama": TINY,
    "qwen3": replace(TINY, architecture="qwen3", qk_norm=True, tie_word_embeddings=True),
    "qwen3_moe": TINY_MOE,
    "mixtral": replace(
        TINY, architecture="mixtral", num_experts=4, num_experts_per_tok=2,
        intermediate_size=96, moe_intermediate_size=96,
    ),
}  # fmt: skip


def _random_weights(config: ModelConfig) -> dict[str, np.ndarray[Any, Any]]:
    model = Transformer(config, torch.device("cpu"), torch.float32)
    generator = np.random.default_rng(5)
    return {
        name: generator.normal(0, 0.2, tuple(weight.shape)).astype(np.float32)
        for name, weight in model.named_weights()
    }


def _permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _gguf_tensors(
    config: ModelConfig, weights: dict[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    tensors: dict[str, Any] = {}
    stacks: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            tensors[f"{TOP[stem]}.weight"] = weight
            continue
        layer, rest = stem.removeprefix("model.layers.").split(".", 1)
        if ".experts." in rest:
            key = f"blk.{layer}.{EXPERT[rest.rsplit('.', 1)[1]]}.weight"
            stacks.setdefault(key, []).append(weight)
            continue
        if config.architecture in ("llama", "mixtral") and rest.endswith(("q_proj", "k_proj")):
            q = rest.endswith("q_proj")
            weight = _permute(
                weight, config.num_attention_heads if q else config.num_key_value_heads
            )
        tensors[f"blk.{layer}.{LAYER[rest]}.weight"] = weight
    return tensors | {key: np.stack(stack) for key, stack in stacks.items()}


def _write(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray[Any, Any]],
    quantise: gguf.GGMLQuantizationType | None = None,
    architecture: str | None = None,
) -> Path:
    names = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}
    writer = gguf.GGUFWriter(
        path, architecture or names.get(config.architecture, config.architecture)
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, value in tensors.items():
        if quantise is not None and value.ndim > 1:
            writer.add_tensor(name, gguf.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _load(path: Path) -> Transformer:
    with pytest.warns(UserWarning, match="tokenizer None is not byte-level BPE"):
        return load_model(path, "cpu")


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_round_trip_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    config = CONFIGS[architecture]
    weights = _random_weights(config)
    model = _load(_write(tmp_path / "m.gguf", config, _gguf_tensors(config, weights)))
    loaded = dict(model.named_weights())
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(loaded[name].numpy(), weight), name
    assert replace(model.config, norm_topk_prob=True) == config
    assert model.tokenizer is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_dequantises_like_the_gguf_package(kind: str, tmp_path: Path) -> None:
    quantise = gguf.GGMLQuantizationType[kind]
    config = replace(TINY, hidden_size=64, intermediate_size=128)
    tensors = _gguf_tensors(config, _random_weights(config))
    file = GGUFFile(_write(tmp_path / "m.gguf", config, tensors, quantise))
    for name, value in tensors.items():
        expected = value
        if value.ndim > 1:
            expected = gguf.dequantize(gguf.quantize(value, quantise), quantise)
            assert not np.array_equal(expected, value)
        got = file.dequantise(name)
        assert np.array_equal(got.view(np.uint32), expected.reshape(value.shape).view(np.uint32))


def _message(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(path, "cpu")
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    return _gguf_tensors(TINY, _random_weights(TINY))


def test_every_truncation_is_an_error(
    tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    whole = _write(tmp_path / "whole.gguf", TINY, tensors).read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (0, 3, 10, 24, 25, 60, 200, 500, 900, 1500, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:keep])
        message = _message(path)
        if keep >= len(whole) // 2:
            assert "truncated: tensor '" in message
    path.write_bytes(whole)
    _load(path)


def test_flipped_header_bytes_never_escape_as_other_errors(
    tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    """Whatever one damaged byte does, it is a ModelLoadError or a file that still loads."""
    whole = _write(tmp_path / "whole.gguf", TINY, tensors).read_bytes()
    path = tmp_path / "damaged.gguf"
    failures = 0
    for position in range(4, 1200, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            GGUFFile(path)
        except ModelLoadError:
            failures += 1
    assert failures > 30


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file" in _message(path)


def test_unknown_architecture(tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", TINY, tensors, architecture="gemma3")
    assert "unknown architecture 'gemma3'; expected one of llama, qwen3, qwen3moe" in _message(path)


def test_missing_tensor(tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    del tensors["blk.1.ffn_up.weight"]
    path = _write(tmp_path / "m.gguf", TINY, tensors)
    assert "missing tensor 'model.layers.1.mlp.up_proj.weight'" in _message(path)


def test_left_over_tensor(tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    """Llama 3.1's frequency factors: ignoring them would give wrong long contexts."""
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    path = _write(tmp_path / "m.gguf", TINY, tensors)
    assert "unexpected tensor 'rope_freqs.weight'" in _message(path)


def test_wrong_shape(tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    tensors["blk.0.attn_output.weight"] = np.ones((64, 32), np.float32)
    path = _write(tmp_path / "m.gguf", TINY, tensors)
    message = "'blk.0.attn_output.weight' has shape [64, 32], expected [64, 64]"
    assert message in _message(path)
