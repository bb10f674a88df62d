"""Loads a GGUF file: configuration, dequantised weights and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.model.gguf_file import GGUFFile
from ch15_helpers.model.hf_directory import check_names, copy_checked
from ch15_helpers.model.transformer import Transformer

# Names below `blk.i.` and below `model.layers.i.`.
_LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# One GGUF tensor holds a projection of all experts: the names are Qwen3-MoE's and Mixtral's.
_EXPERT_NAMES = {
    "ffn_gate_exps.weight": ("gate_proj", "w1"),
    "ffn_up_exps.weight": ("up_proj", "w3"),
    "ffn_down_exps.weight": ("down_proj", "w2"),
}
_ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}


def load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Loads a GGUF file of Llama, Mixtral (llama with experts), Qwen3 or Qwen3-MoE architecture.

    Raises:
        ModelLoadError: not GGUF, truncated, unknown architecture or tokenizer, or a tensor that
            is missing, left over or of the wrong shape.
    """
    file = GGUFFile(path)
    config = gguf_config(file)
    model = Transformer(config, device, dtype)
    sources = dict(_hf_names(file, config))
    wanted = dict(model.named_weights())
    check_names(wanted, sources, str(path))
    stacked: dict[str, torch.Tensor] = {}
    for name, target in wanted.items():
        gguf_name, expert = sources[name]
        if expert is None:
            value = torch.from_numpy(_writable(file.dequantise(gguf_name)))
        else:
            if expert == 0:
                stacked[gguf_name] = torch.from_numpy(_writable(file.dequantise(gguf_name)))
            value = stacked[gguf_name][expert]
            if expert == config.num_experts - 1:
                del stacked[gguf_name]
        heads = _permuted_heads(name, config)
        if heads and value.dim() == 2:
            value = _unpermute(value, heads)
        copy_checked(target, value, gguf_name, path)
    from ch15_helpers.model.tokenizer import Tokenizer

    model.tokenizer = Tokenizer.from_gguf(file)
    return model


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration in a GGUF file's metadata and tensor shapes.

    Raises:
        ModelLoadError: unknown architecture, or a key is missing.
    """
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: unknown architecture {name!r}; "
            f"expected one of {', '.join(_ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{name}.{key}", default)
        if value is None:
            raise ModelLoadError(f"{file.path}: metadata has no key '{name}.{key}'")
        return value

    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path}: missing tensor 'token_embd.weight'")
    if get("rope.scaling.type", "none") != "none":
        raise ModelLoadError(
            f"{file.path}: rope scaling {get('rope.scaling.type')!r} is not supported in GGUF "
            "files; load the model's safetensors"
        )
    experts = int(get("expert_count", 0))
    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    architecture = _ARCHITECTURES[name]
    inner = int(get("feed_forward_length"))
    eos = file.metadata.get("tokenizer.ggml.eos_token_id")
    return ModelConfig(
        architecture="mixtral" if architecture == "llama" and experts else architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=int(get("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(get("attention.head_count_kv", heads)),
        head_dim=int(get("attention.key_length", hidden // heads)),
        max_position_embeddings=int(get("context_length")),
        # Stored as float32: the shortest decimal that rounds to it is the value that was meant.
        rms_norm_eps=_float32(get("attention.layer_norm_rms_epsilon")),
        rope_theta=_float32(get("rope.freq_base", 10000.0)),
        tie_word_embeddings="output.weight" not in file.tensors,
        qk_norm=architecture.startswith("qwen3"),
        num_experts=experts,
        num_experts_per_tok=int(get("expert_used_count", 0)),
        moe_intermediate_size=int(get("expert_feed_forward_length", inner)) if experts else 0,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=() if eos is None else (int(eos),),
    )


def _float32(value: float) -> float:
    return float(str(np.float32(value)))


def _hf_names(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Checkpoint name to (GGUF tensor, index of the expert in it or None)."""
    mixtral = config.architecture == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    for gguf_name in file.tensors:
        parts = gguf_name.split(".", 2)
        if parts[0] != "blk" or len(parts) < 3:
            yield _TOP_NAMES.get(gguf_name, gguf_name), (gguf_name, None)
            continue
        prefix, rest = f"model.layers.{parts[1]}", parts[2]
        if rest in _EXPERT_NAMES:
            projection = _EXPERT_NAMES[rest][mixtral]
            for expert in range(config.num_experts):
                yield f"{prefix}.{block}.experts.{expert}.{projection}.weight", (gguf_name, expert)
        elif rest == "ffn_gate_inp.weight":
            yield f"{prefix}.{block}.gate.weight", (gguf_name, None)
        else:
            yield f"{prefix}.{_LAYER_NAMES.get(rest, rest)}", (gguf_name, None)


def _permuted_heads(name: str, config: ModelConfig) -> int:
    """Heads whose rows llama.cpp interleaved, 0 where the tensor is stored as it is."""
    if config.architecture not in ("llama", "mixtral"):
        return 0
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of rows, which pairs channels (2i, 2i + 1) for its rotary kernel."""
    rows, columns = weight.shape
    return weight.view(heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)


def _writable(values: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
    # torch warns about memory that it must not write to: F32 tensors are views of the file.
    return values if values.flags.writeable else values.copy()
