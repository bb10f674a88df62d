"""Reads a Hugging Face ``config.json``, refusing what this transformer would get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.config import ARCHITECTURES, Llama3RopeScaling, ModelConfig


def parse_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """See :meth:`ModelConfig.from_hf`."""
    if not isinstance(config, Mapping):
        raise ModelLoadError(f"config.json holds a {type(config).__name__}, expected a JSON object")
    architecture = _architecture(config)
    _reject_unsupported(config, architecture)
    heads = int(_require(config, "num_attention_heads"))
    hidden = int(_require(config, "hidden_size"))
    moe = architecture in ("qwen3_moe", "mixtral")
    experts_key = "num_local_experts" if architecture == "mixtral" else "num_experts"
    moe_size_key = "intermediate_size" if architecture == "mixtral" else "moe_intermediate_size"
    theta, scaling = _rope(config)
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(_require(config, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(_require(config, "intermediate_size")),
        num_hidden_layers=int(_require(config, "num_hidden_layers")),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        max_position_embeddings=int(_require(config, "max_position_embeddings")),
        rms_norm_eps=float(_require(config, "rms_norm_eps")),
        rope_theta=theta,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=architecture.startswith("qwen3"),
        attention_bias=bool(config.get("attention_bias", False)),
        num_experts=_experts(config, experts_key) if moe else 0,
        num_experts_per_tok=int(_require(config, "num_experts_per_tok")) if moe else 0,
        moe_intermediate_size=int(_require(config, moe_size_key)) if moe else 0,
        norm_topk_prob=architecture != "qwen3_moe" or bool(config.get("norm_topk_prob", False)),
        bos_token_id=_optional_id(config.get("bos_token_id")),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        rope_scaling=scaling,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelLoadError(
            f"unknown architecture {model_type!r} (field model_type); "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    return str(model_type)


def _require(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ModelLoadError(f"config.json has no field {name!r}, which this architecture needs")
    return config[name]


def _experts(config: Mapping[str, Any], name: str) -> int:
    # transformers 5 writes num_local_experts for every MoE; older Qwen3-MoE files num_experts.
    if config.get(name) is None and config.get("num_local_experts") is not None:
        return int(config["num_local_experts"])
    return int(_require(config, name))


def _reject_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    window = config.get("sliding_window")
    window_used = config.get("use_sliding_window", window is not None)
    problems = {
        "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "sliding_window": bool(window and window_used),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "quantization_config": config.get("quantization_config") is not None,
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "decoder_sparse_step": architecture == "qwen3_moe"
        and config.get("decoder_sparse_step", 1) != 1,
    }
    for name, present in problems.items():
        if present:
            raise ModelLoadError(
                f"config.json: {name} = {config.get(name)!r} is not supported; expected a "
                "plain Llama, Qwen3, Qwen3-MoE or Mixtral configuration without it"
            )


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelLoadError(
            f"config.json: rope_type {kind!r} is not supported; expected 'default' or 'llama3'"
        )
    return theta, Llama3RopeScaling(
        factor=float(_require(rope, "factor")),
        low_freq_factor=float(_require(rope, "low_freq_factor")),
        high_freq_factor=float(_require(rope, "high_freq_factor")),
        original_max_position_embeddings=int(_require(rope, "original_max_position_embeddings")),
    )


def _optional_id(value: Any) -> int | None:
    ids = _token_ids(value)
    return ids[0] if ids else None


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
