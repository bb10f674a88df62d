"""Fetch a cached prefix, or compute it again? The break-even, as an equation.

Qin et al., "Mooncake" (FAST 2025), equations 1 and 2: computing a prefix of ``p`` tokens takes
``l (a p² d + b p d²)`` operations, its cache has ``2 p l d s / gqa`` bytes, so that reuse shortens
the time to first token where ``B / G > 2 d s / (gqa (a p d + b d²))``. :class:`ReuseCost` is the
same with this package's exact counts, and with a fixed cost for every piece that is fetched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ch15_helpers.kv.sizing import KVFormat, KVShape, Link, bytes_per_token
from ch15_helpers.model.config import ModelConfig


@dataclass(frozen=True)
class ReuseCost:
    """What one prefix costs either way.

    Attributes:
        flops_per_token: operations in the layers that do not depend on the context, two for each
            weight that a token meets; the embedding and the output head are not part of a prefix.
        flops_per_pair: operations of attention for each (query, visible key).
        bytes_per_token: of the cache, scales included.
    """

    flops_per_token: float
    flops_per_pair: float
    bytes_per_token: float

    @classmethod
    def of(cls, config: ModelConfig, form: KVFormat, block_size: int = 16) -> ReuseCost:
        """Exact counts of a model that this package runs."""
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        weights = config.hidden_size * (2 * q_dim + 2 * kv_dim)
        if config.is_moe:
            weights += (
                config.num_experts_per_tok * 3 * config.hidden_size * (config.moe_intermediate_size)
            )
            weights += config.num_experts * config.hidden_size
        else:
            weights += 3 * config.hidden_size * config.intermediate_size
        shape = KVShape.from_config(config.architecture, config)
        return cls(
            2.0 * weights * config.num_hidden_layers,
            4.0 * q_dim * config.num_hidden_layers,
            bytes_per_token(shape, form, block_size),
        )

    def recompute_flops(self, num_tokens: int) -> float:
        """Operations of a prefix of ``num_tokens`` tokens, causal attention included."""
        pairs = num_tokens * (num_tokens + 1) / 2
        return self.flops_per_token * num_tokens + self.flops_per_pair * pairs

    def recompute_s(self, num_tokens: int, tflops: float) -> float:
        """Seconds at a measured rate of 1e12 operations per second."""
        return self.recompute_flops(num_tokens) / (tflops * 1e12)

    def fetch_s(self, num_tokens: int, link: Link, pieces_per_token: float = 0.0) -> float:
        """Seconds over a link, in ``pieces_per_token`` requests for each token, at least one."""
        pieces = max(1, math.ceil(num_tokens * pieces_per_token))
        return link.transfer_s(num_tokens * self.bytes_per_token, pieces)

    def should_fetch(
        self, num_tokens: int, tflops: float, link: Link, pieces_per_token: float = 0.0
    ) -> bool:
        """Whether fetching is the faster of the two."""
        fetch_s = self.fetch_s(num_tokens, link, pieces_per_token)
        return fetch_s < self.recompute_s(num_tokens, tflops)

    def break_even_GBps(self, num_tokens: int, tflops: float) -> float:
        """Bandwidth above which fetching wins, latency left out; falls with the context."""
        seconds = self.recompute_s(num_tokens, tflops)
        return num_tokens * self.bytes_per_token / seconds / 1e9

    def break_even_tokens(self, tflops: float, link: Link, pieces_per_token: float = 0.0) -> float:
        """Length from which on fetching wins: 0 where it always does.

        Solves ``latency · max(1, pieces) + bytes / B = operations / G`` for the length. There is
        always such a length, as attention's share grows with the square.
        """
        rate = tflops * 1e12
        square = self.flops_per_pair / 2 / rate
        linear = (self.flops_per_token + self.flops_per_pair / 2) / rate
        linear -= self.bytes_per_token / (link.GBps * 1e9)
        whole = _positive_root(square, linear, link.latency_s)
        if pieces_per_token * whole <= 1:
            return whole
        return _positive_root(square, linear - pieces_per_token * link.latency_s, 0.0)


def _positive_root(square: float, linear: float, constant: float) -> float:
    """Largest length n with ``square n² + linear n = constant``; 0 where it holds from 0 on."""
    return max(0.0, (-linear + math.sqrt(linear**2 + 4 * square * constant)) / (2 * square))


def mooncake_break_even_GBps(
    num_tokens: int,
    hidden_size: int,
    gqa: float,
    value_bytes: int,
    tflops: float,
    a: float = 4.0,
    b: float = 22.0,
) -> float:
    """Mooncake's equation 2 as printed: least bandwidth with which reuse pays, in GB/s.

    Args:
        num_tokens: ``p``, the prefix. hidden_size: ``d``. gqa: query heads for each KV head.
        value_bytes: ``s``. tflops: ``G``, of all devices together.
        a, b: coefficients of their operation count; theirs for LLaMA3-70B are 4 and 22. Their
            ``a p²`` counts the whole square of attention, not the causal half.
    """
    per_operation: float = 2 * hidden_size * value_bytes
    per_operation /= gqa * (a * num_tokens * hidden_size + b * hidden_size**2)
    return per_operation * tflops * 1e12 / 1e9
