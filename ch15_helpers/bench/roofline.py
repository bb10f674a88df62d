"""Bytes and operations of a step, and the least time that measured ceilings allow for them.

The limit is Williams et al.'s roofline (2009): a step can be no faster than its bytes over the
read bandwidth, nor than its operations over the matmul rate. Bytes are the least that any
implementation must move: every weight that the step touches once, every cached key and value
once, the new ones written once. Activations, norm weights and embedding rows are not counted, so
the limit is never too high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ch15_helpers.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

    from ch15_helpers.hardware import Ceilings
    from ch15_helpers.model.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add is two) and bytes of device memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


def limit_s(work: Work, ceilings: Ceilings, dtype: torch.dtype | str) -> float:
    """Least seconds for the work: the larger of the memory time and the arithmetic time.

    Raises:
        HardwareError: no matmul ceiling was measured for the dtype.
    """
    return max(memory_s(work, ceilings), compute_s(work, ceilings, dtype))


def memory_s(work: Work, ceilings: Ceilings) -> float:
    """Seconds to move the bytes at the measured read bandwidth."""
    return work.bytes / (ceilings.read_GBps * 1e9)


def compute_s(work: Work, ceilings: Ceilings, dtype: torch.dtype | str) -> float:
    """Seconds to do the operations at the measured matmul rate of the dtype."""
    return work.flops / (ceilings.tflops(dtype) * 1e12)


def bound_by(work: Work, ceilings: Ceilings, dtype: torch.dtype | str) -> str:
    """Which ceiling sets the limit: ``"memory"`` or ``"compute"``."""
    memory = memory_s(work, ceilings) >= compute_s(work, ceilings, dtype)
    return "memory" if memory else "compute"


def fraction_of_limit(
    measured_s: float, work: Work, ceilings: Ceilings, dtype: torch.dtype | str
) -> float:
    """Limit over measured time: 1.0 is as fast as this machine allows."""
    if measured_s <= 0:
        raise InvalidRequestError(f"measured time is {measured_s} s; expected more than 0")
    return limit_s(work, ceilings, dtype) / measured_s


def expected_experts_touched(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Distinct experts of one layer that a batch needs if routing were uniform and independent.

    ``E · (1 − (1 − k/E)^n)``. Real routers are skewed, so this is an upper estimate of the mean:
    pass the counted number where you have it.
    """
    if not 0 < experts_per_token <= num_experts:
        raise InvalidRequestError(
            f"experts_per_token={experts_per_token}, num_experts={num_experts}; "
            "expected 1 ≤ experts_per_token ≤ num_experts"
        )
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** num_tokens)


def step_work(
    config: ModelConfig,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    dtype_bytes: int,
    *,
    kv_dtype_bytes: int | None = None,
    num_sampled: int | None = None,
    experts_touched: float | None = None,
) -> Work:
    """Work of one step of any mix of prefill chunks and decodes.

    Args:
        query_lens: new tokens of each sequence.
        context_lens: tokens in each sequence's cache after the step, the new ones included.
        dtype_bytes: bytes of a weight. kv_dtype_bytes: of a cached element, default the same.
        num_sampled: rows whose logits are computed; default one per sequence.
        experts_touched: distinct experts per layer, counted; default the uniform expectation.

    Raises:
        InvalidRequestError: lengths that do not match, or a context shorter than its query.
    """
    if len(query_lens) != len(context_lens) or not query_lens:
        raise InvalidRequestError(
            f"{len(query_lens)} query lengths and {len(context_lens)} context lengths; "
            "expected the same number, at least one"
        )
    if any(q < 1 or c < q for q, c in zip(query_lens, context_lens, strict=True)):
        raise InvalidRequestError("expected 1 ≤ query length ≤ context length for every sequence")
    tokens, sampled = sum(query_lens), len(query_lens) if num_sampled is None else num_sampled
    kv_token_bytes = config.kv_bytes_per_token(kv_dtype_bytes or dtype_bytes)
    params_read = _params_read(config, tokens, experts_touched)
    # A query at position p sees p + 1 keys, so a chunk of q ending at c sees q·c − q(q−1)/2.
    pairs = sum(q * c - q * (q - 1) // 2 for q, c in zip(query_lens, context_lens, strict=True))
    q_dim = config.num_attention_heads * config.head_dim
    flops = (
        2.0 * _layer_params_per_token(config) * config.num_hidden_layers * tokens
        + 4.0 * pairs * q_dim * config.num_hidden_layers
        + 2.0 * config.vocab_size * config.hidden_size * sampled
    )
    head = config.vocab_size * config.hidden_size if sampled else 0
    # Earlier keys and values are read once, new ones written once: together the context.
    kv_bytes = sum(context_lens) * kv_token_bytes
    return Work(flops, (params_read + head) * dtype_bytes + kv_bytes)


def decode_step_work(
    config: ModelConfig,
    context_lens: Sequence[int],
    dtype_bytes: int,
    *,
    kv_dtype_bytes: int | None = None,
    experts_touched: float | None = None,
) -> Work:
    """Work of one decode step: one new token for each sequence.

    ``context_lens`` counts the cache after the step, the new token included.
    """
    return step_work(
        config,
        [1] * len(context_lens),
        context_lens,
        dtype_bytes,
        kv_dtype_bytes=kv_dtype_bytes,
        experts_touched=experts_touched,
    )


def prefill_work(
    config: ModelConfig,
    prompt_lens: Sequence[int],
    dtype_bytes: int,
    *,
    kv_dtype_bytes: int | None = None,
    experts_touched: float | None = None,
) -> Work:
    """Work of prefilling whole prompts in one step, logits for each last token only."""
    return step_work(
        config,
        prompt_lens,
        prompt_lens,
        dtype_bytes,
        kv_dtype_bytes=kv_dtype_bytes,
        experts_touched=experts_touched,
    )


def generate_limit_s(
    config: ModelConfig,
    prompt_lens: Sequence[int],
    new_tokens: int,
    ceilings: Ceilings,
    dtype: torch.dtype | str,
    dtype_bytes: int,
) -> float:
    """Least seconds for a static batch: one prefill, which gives the first token, then decodes.

    Each step's limit is taken on its own, since a memory-bound step cannot lend its idle
    arithmetic to another.
    """
    if new_tokens < 1:
        raise InvalidRequestError(f"new_tokens is {new_tokens}; expected 1 or more")
    total = limit_s(prefill_work(config, prompt_lens, dtype_bytes), ceilings, dtype)
    for done in range(1, new_tokens):
        lens = [n + done for n in prompt_lens]
        total += limit_s(decode_step_work(config, lens, dtype_bytes), ceilings, dtype)
    return total


def _attention_params(config: ModelConfig) -> int:
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * q_dim + 2 * kv_dim)


def _layer_params_per_token(config: ModelConfig) -> int:
    """Matmul weights of one layer that one token meets."""
    attention = _attention_params(config)
    if not config.is_moe:
        return attention + 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    return attention + experts + config.num_experts * config.hidden_size


def _params_read(config: ModelConfig, tokens: int, experts_touched: float | None) -> float:
    """Weights of all layers that a step reads, the output head and the embedding left out."""
    attention = _attention_params(config)
    if not config.is_moe:
        per_layer: float = attention + 3 * config.hidden_size * config.intermediate_size
    else:
        touched = (
            expected_experts_touched(config.num_experts, config.num_experts_per_tok, tokens)
            if experts_touched is None
            else experts_touched
        )
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        per_layer = attention + touched * expert + config.num_experts * config.hidden_size
    return per_layer * config.num_hidden_layers
