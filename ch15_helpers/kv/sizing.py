"""Arithmetic of the KV cache: its bytes, how many requests fit, what moving it takes.

Everything here is an equation: no tensor is allocated, nothing is measured. Rates come in as
arguments, from measurements where there are some; :data:`NOMINAL_LINKS` are the numbers on the
label, and every time computed from one is *modelled*. Whether to fetch a cached prefix or to
compute it again is in :mod:`ch15_helpers.kv.reuse`. Explained in the chapter
``kv_cache_management_math``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ch15_helpers.errors import CapacityError
from ch15_helpers.model.config import (
    LLAMA3_8B,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    SMOLLM2_135M,
    ModelConfig,
)

Layout = Literal["block_major", "layer_major"]


@dataclass(frozen=True)
class KVShape:
    """What one token leaves in each layer of a model's cache.

    Attributes:
        num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: as in ModelConfig.
        kv_lora_rank, qk_rope_head_dim: multi-head latent attention (DeepSeek-V2, 2024): one latent
            vector and one rotated key for all heads, instead of K and V. 0 for the others.
        num_parameters: weights of the whole model, as published; 0 where not given.
    """

    name: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    num_parameters: float = 0

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> KVShape:
        """The shape of a model that this package runs."""
        return cls(
            name,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            num_parameters=config.num_parameters(),
        )

    @property
    def attention(self) -> str:
        """``MHA``, ``GQA``, ``MQA`` or ``MLA``."""
        if self.kv_lora_rank:
            return "MLA"
        if self.num_key_value_heads == self.num_attention_heads:
            return "MHA"
        return "MQA" if self.num_key_value_heads == 1 else "GQA"

    @property
    def values_per_token_and_layer(self) -> int:
        """Cached numbers: K and V of each KV head, or the latent and the rotated key."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def scales_per_block_and_layer(self) -> int:
        """One for K and one for V of each head; the latent and its key share one."""
        return 1 if self.kv_lora_rank else 2 * self.num_key_value_heads

    @property
    def row_values(self) -> int:
        """Numbers of one token side by side in a page: the unit of padding."""
        return self.values_per_token_and_layer // (1 if self.kv_lora_rank else 2)


@dataclass(frozen=True)
class KVFormat:
    """How a cached number is stored: its bytes, and those of a scale (0: there are none)."""

    name: str
    value_bytes: int
    scale_bytes: int = 0


FLOAT32 = KVFormat("float32", 4)
BFLOAT16 = KVFormat("bfloat16", 2)
FLOAT16 = KVFormat("float16", 2)
FP8_E4M3 = KVFormat("fp8_e4m3", 1, 4)
INT8 = KVFormat("int8", 1, 4)
FORMATS: Mapping[str, KVFormat] = MappingProxyType(
    {f.name: f for f in (FLOAT32, BFLOAT16, FLOAT16, FP8_E4M3, INT8)}
)

PUBLISHED_SHAPES: Mapping[str, KVShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            KVShape.from_config("SmolLM2-135M", SMOLLM2_135M),
            KVShape("Llama-2-7B", 32, 32, 32, 128, num_parameters=6.738e9),
            KVShape("Falcon-7B", 32, 71, 1, 64, num_parameters=7.217e9),
            KVShape.from_config("Llama-3.1-8B", LLAMA3_8B),
            KVShape("Llama-3.1-70B", 80, 64, 8, 128, num_parameters=70.55e9),
            KVShape("Llama-3.1-405B", 126, 128, 8, 128, num_parameters=405.9e9),
            KVShape("Qwen2.5-72B", 80, 64, 8, 128, num_parameters=72.7e9),
            KVShape.from_config("Qwen3-30B-A3B", QWEN3_30B_A3B),
            KVShape.from_config("Mixtral-8x7B", MIXTRAL_8X7B),
            KVShape("DeepSeek-V3", 61, 128, 128, 128, 512, 64, num_parameters=671e9),
        )
    }
)
"""Models by name, from the config.json that each was published with."""


def values_bytes_per_token(shape: KVShape, form: KVFormat) -> int:
    """Bytes of one token's numbers over all layers, scales not counted (as papers count)."""
    return shape.num_hidden_layers * shape.values_per_token_and_layer * form.value_bytes


def block_bytes(shape: KVShape, form: KVFormat, block_size: int = 16) -> int:
    """Bytes of one block over all layers, its scales and their padding included.

    Equal to ``PagedKVCache.block_bytes`` for every shape that a pool can have.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    scales = form.scale_bytes * shape.num_hidden_layers * shape.scales_per_block_and_layer
    unit = math.lcm(16, shape.row_values)
    padded = -(-scales // unit) * unit
    return values_bytes_per_token(shape, form) * block_size + padded


def bytes_per_token(shape: KVShape, form: KVFormat, block_size: int = 16) -> float:
    """A full block's bytes over its tokens: what a token really takes, scales included."""
    return block_bytes(shape, form, block_size) / block_size


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that ``num_tokens`` tokens occupy; the last one may be partly empty."""
    return -(-num_tokens // block_size)


def kv_bytes(shape: KVShape, form: KVFormat, num_tokens: int, block_size: int = 16) -> int:
    """Bytes that one sequence occupies, rounded up to whole blocks."""
    return blocks_for(num_tokens, block_size) * block_bytes(shape, form, block_size)


@dataclass(frozen=True)
class MemoryPlan:
    """How a device's memory is divided, all in bytes unless the name says otherwise.

    ``unused`` is what is left of the pool after whole requests, ``rounding`` the slots of the
    requests' last blocks that stay empty.
    """

    memory: int
    weights: int
    activations: int
    pool: int
    num_blocks: int
    blocks_per_request: int
    num_requests: int
    unused: int
    rounding: int


def plan_memory(
    memory_bytes: int,
    weight_bytes: int,
    activation_bytes: int,
    shape: KVShape,
    form: KVFormat,
    context_tokens: int,
    block_size: int = 16,
    utilization: float = 1.0,
) -> MemoryPlan:
    """Requests of one context length that fit beside the weights.

    Args:
        memory_bytes: of the device. utilization: fraction of it that may be used at all.
        activation_bytes: the largest step's, see ``serving.memory.activation_bytes``.
        context_tokens: prompt and output together, per request.

    Raises:
        CapacityError: weights and activations leave no room for one block.
    """
    if context_tokens < 1 or not 0 < utilization <= 1:
        raise ValueError(
            f"expected context_tokens ≥ 1 and utilization in (0, 1], got {context_tokens} and "
            f"{utilization}"
        )
    pool = int(memory_bytes * utilization) - weight_bytes - activation_bytes
    size = block_bytes(shape, form, block_size)
    if pool < size:
        raise CapacityError(
            f"{shape.name}: weights and activations take {weight_bytes + activation_bytes:,} of "
            f"{int(memory_bytes * utilization):,} bytes and leave no room for a block of "
            f"{size:,}; use a smaller type, more memory or several devices",
            blocks_needed=1,
            blocks_total=0,
        )
    num_blocks, each = pool // size, blocks_for(context_tokens, block_size)
    requests = num_blocks // each
    empty_slots = each * block_size - context_tokens
    return MemoryPlan(
        memory=memory_bytes,
        weights=weight_bytes,
        activations=activation_bytes,
        pool=pool,
        num_blocks=num_blocks,
        blocks_per_request=each,
        num_requests=requests,
        unused=pool - requests * each * size,
        rounding=requests * empty_slots * size // block_size,
    )


@dataclass(frozen=True)
class Link:
    """A way for bytes, in one direction.

    Attributes:
        GBps: 1e9 bytes per second. latency_s: fixed cost of each piece that is asked for.
        kind: ``measured`` on this machine, or ``nominal``: the label's number, never reached.
        source: where a nominal number comes from.
    """

    name: str
    GBps: float
    latency_s: float = 0.0
    kind: Literal["measured", "nominal"] = "measured"
    source: str = ""

    def __post_init__(self) -> None:
        if self.GBps <= 0 or self.latency_s < 0:
            raise ValueError(
                f"link {self.name!r}: expected GBps > 0 and latency_s ≥ 0, got {self.GBps} and "
                f"{self.latency_s}"
            )

    def transfer_s(self, num_bytes: float, num_pieces: int = 1) -> float:
        """Seconds for ``num_bytes`` asked for in ``num_pieces`` pieces, one after the other."""
        return num_pieces * self.latency_s + num_bytes / (self.GBps * 1e9)


def _nominal(name: str, gigabytes: float, source: str) -> Link:
    return Link(name, gigabytes, 0.0, "nominal", source)


NOMINAL_LINKS: Mapping[str, Link] = MappingProxyType(
    {
        link.name: link
        for link in (
            _nominal("NVLink 4", 450.0, "H100 architecture white paper: 18 links, 900 both ways"),
            _nominal("PCIe 5.0 x16", 63.0, "32 GT/s, 16 lanes, 128b/130b code"),
            _nominal("PCIe 4.0 x16", 31.5, "16 GT/s, 16 lanes, 128b/130b code"),
            _nominal("400G network", 50.0, "400 gigabit a second over 8"),
            _nominal("100G network", 12.5, "100 gigabit a second over 8"),
            _nominal("NVMe 4.0 x4", 7.88, "16 GT/s, 4 lanes, 128b/130b code"),
            _nominal("10G network", 1.25, "10 gigabit a second over 8"),
        )
    }
)
"""Line rates, one direction, without protocol overhead or latency. Times from them are modelled."""


def num_pieces(shape: KVShape, num_tokens: int, block_size: int, layout: Layout) -> int:
    """Contiguous runs that a sequence's blocks consist of.

    Block-major keeps all layers of a block together; layer-major has two runs (K and V, or one
    latent) for each layer of each block.
    """
    runs = 1
    if layout == "layer_major":
        runs = shape.num_hidden_layers * (1 if shape.kv_lora_rank else 2)
    return blocks_for(num_tokens, block_size) * runs


def move_s(
    shape: KVShape,
    form: KVFormat,
    num_tokens: int,
    link: Link,
    block_size: int = 16,
    layout: Layout = "block_major",
) -> float:
    """Seconds to move one sequence's blocks over a link, nothing overlapped.

    The same equation for a handoff (prefill to decode device), an offload (device to host or
    disk) and a promotion (back): they differ in the link.
    """
    pieces = num_pieces(shape, num_tokens, block_size, layout)
    return link.transfer_s(kv_bytes(shape, form, num_tokens, block_size), pieces)


def exposed_handoff_s(transfer_s: float, compute_s: float, num_layers: int) -> float:
    """What a handoff adds to the prefill when each layer is sent while the next is computed.

    Layers of equal size: the last one's transfer is never hidden, and a slow link hides no more
    than the computation of the layers after the first (as in Splitwise, ISCA 2024).
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    per_layer = transfer_s / num_layers
    return max(per_layer, transfer_s - compute_s * (num_layers - 1) / num_layers)
