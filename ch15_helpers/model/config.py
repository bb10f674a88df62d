"""What a model is: its dimensions, under the names that Hugging Face gives them, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ch15_helpers.errors import ModelLoadError

ARCHITECTURES = ("llama", "mixtral", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's change of the rotary frequencies (``rope_type: llama3`` in config.json).

    Frequencies whose wavelength is longer than
    ``original_max_position_embeddings / low_freq_factor`` are divided by ``factor``, those
    shorter than ``original_max_position_embeddings / high_freq_factor`` are kept, and those
    between are blended linearly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a causal GQA transformer, dense or mixture-of-experts.

    Field names are Hugging Face's. ``head_dim`` is explicit, because Qwen3 does not use
    ``hidden_size / num_attention_heads``. ``num_experts == 0`` means dense feed-forward blocks.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qk_norm: bool = False
    attention_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    rope_scaling: Llama3RopeScaling | None = None

    def __post_init__(self) -> None:
        problem = _first_inconsistency(self)
        if problem is not None:
            raise ModelLoadError(f"model configuration: {problem}")

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.num_experts > 0

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V that one token adds to the cache, over all layers.

        Args:
            dtype_bytes: bytes of one cached element, 2 for bfloat16.
        """
        elements = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return elements * dtype_bytes

    def num_parameters(self, active_only: bool = False) -> int:
        """Weights in the model.

        Args:
            active_only: count only the experts that one token is sent to, which is what a
                decode step of one token reads.
        """
        hidden, head_dim = self.hidden_size, self.head_dim
        q_dim = self.num_attention_heads * head_dim
        kv_dim = self.num_key_value_heads * head_dim
        attention = hidden * (q_dim + 2 * kv_dim) + q_dim * hidden
        if self.attention_bias:
            attention += q_dim + 2 * kv_dim + hidden
        if self.qk_norm:
            attention += 2 * head_dim
        if self.is_moe:
            experts = self.num_experts_per_tok if active_only else self.num_experts
            mlp = experts * 3 * hidden * self.moe_intermediate_size + self.num_experts * hidden
        else:
            mlp = 3 * hidden * self.intermediate_size
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + mlp + 2 * hidden) + embeddings + hidden

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Builds the configuration from a parsed Hugging Face ``config.json``.

        Raises:
            ModelLoadError: an unknown architecture, a missing field, or a feature that this
                transformer does not implement and would otherwise ignore silently.
        """
        from ch15_helpers.model.hf_config import parse_hf_config

        return parse_hf_config(config)


def _first_inconsistency(config: ModelConfig) -> str | None:
    positive = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    )
    for name in positive:
        if getattr(config, name) <= 0:
            return f"{name} is {getattr(config, name)}, expected a positive number"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        return f"head_dim {config.head_dim} is odd, rotary positions need pairs"
    if config.num_experts and not 0 < config.num_experts_per_tok <= config.num_experts:
        return (
            f"num_experts_per_tok {config.num_experts_per_tok} is not between 1 and "
            f"num_experts {config.num_experts}"
        )
    return None


SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)

LLAMA3_8B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    tie_word_embeddings=False,
    bos_token_id=128000,
    eos_token_ids=(128001, 128009),
)

QWEN3_30B_A3B = ModelConfig(
    architecture="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    tie_word_embeddings=False,
    qk_norm=True,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    bos_token_id=151643,
    eos_token_ids=(151645, 151643),
)

MIXTRAL_8X7B = ModelConfig(
    architecture="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
    tie_word_embeddings=False,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=14336,
    bos_token_id=1,
    eos_token_ids=(2,),
)

# No end-of-sequence token: a random model would otherwise stop at arbitrary places.
TINY = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
)

TINY_MOE = ModelConfig(
    architecture="qwen3_moe",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
    qk_norm=True,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
)

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "SMOLLM2_135M": SMOLLM2_135M,
        "LLAMA3_8B": LLAMA3_8B,
        "QWEN3_30B_A3B": QWEN3_30B_A3B,
        "MIXTRAL_8X7B": MIXTRAL_8X7B,
        "TINY": TINY,
        "TINY_MOE": TINY_MOE,
    }
)
