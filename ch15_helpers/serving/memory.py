"""How large the KV pool may be, and what a block in it saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from ch15_helpers.kernels.dispatch import num_processors
from ch15_helpers.kernels.kv_quant import resolve_kv_dtype
from ch15_helpers.kv.cache import num_blocks_for_memory
from ch15_helpers.kv.policies import RecomputeCost
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.serving.config import EngineConfig

_ACTIVATIONS_FRACTION = 1 / 16  # of a GPU's memory, for a step of a budget that is chosen
_CPU_FRACTION = 0.25  # of available RAM; pages that are never written to are never backed


def pool_size(
    model: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> int:
    """Blocks that fit, but no more than ``max_num_seqs`` contexts of full length can use.

    On CUDA the weights must be loaded already: what they take is counted as used, and room for
    the largest step's activations is kept back. On CPU a quarter of the available memory (of the
    container, where it has a limit) is the bound.

    Raises:
        CapacityError: not even one block fits.
    """
    kv_dtype = resolve_kv_dtype(dtype if config.kv_dtype is None else config.kv_dtype)
    if device.type == "cuda":
        budget = _cuda_budget_bytes(model, config, device, dtype)
    else:
        budget = int(_CPU_FRACTION * _available_bytes())
    fits = num_blocks_for_memory(budget, model, config.block_size, kv_dtype)
    if config.enable_prefix_caching and device.type == "cuda":
        return fits  # a cache makes use of everything
    model_len = model.max_position_embeddings
    if config.max_model_len is not None:
        model_len = min(model_len, config.max_model_len)
    useful = config.max_num_seqs * -(-model_len // config.block_size)
    return min(fits, useful)


def recompute_cost_of(model: ModelConfig) -> RecomputeCost:
    """What it costs to compute KV again, in seconds at a nominal TFLOP/s: only ratios matter.

    Two operations for each weight that a token visits, and four (two products) for each query
    head's channel and each pair of a query and a key.
    """
    heads = model.num_attention_heads * model.head_dim
    return RecomputeCost(
        token_s=2 * model.num_parameters(active_only=True) / 1e12,
        pair_s=4 * model.num_hidden_layers * heads / 1e12,
    )


def activation_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """Upper estimate of a step's activations: the widest layer twice over, and the logits.

    Per token: the residual stream and its norm, Q, K and V, and the feed-forward block's gate, up
    and product, for each expert that the token visits. Per sampled row: logits in the model's
    type and in float32, with as much again for sampling.
    """
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    inner = model.intermediate_size
    if model.is_moe:
        inner = model.moe_intermediate_size * model.num_experts_per_tok
    per_token = 4 * model.hidden_size + 2 * heads * model.head_dim + 4 * inner
    per_row = model.vocab_size * (dtype.itemsize + 8)
    tokens = config.max_num_batched_tokens
    rows = min(config.max_num_seqs, tokens)
    return 2 * tokens * per_token * dtype.itemsize + rows * per_row


def throughput_tokens(
    model: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> int:
    """A ``max_num_batched_tokens`` for throughput: whole waves of tiles in every product.

    A matrix product's tiles of 256 tokens by 128 features go to a GPU's processors in waves, and
    the last wave is as long as a full one. With 64 tokens a processor a product whose width is a
    multiple of 512 has as many tiles as fill whole waves: 8448 tokens on 132 processors, where
    8192 fill 7.76 of 8 waves of a product 4096 wide. Halved until the activations of a step take
    a sixteenth of the memory, but no less than ``config`` has; on a CPU what ``config`` has.
    """
    least = config.max_num_batched_tokens
    if device.type != "cuda":
        return least
    room = torch.cuda.mem_get_info(device)[1] * _ACTIVATIONS_FRACTION
    tokens = 64 * num_processors(device)
    while activation_bytes(model, replace(config, max_num_batched_tokens=tokens), dtype) > room:
        tokens //= 2
        if tokens <= least:
            return least
    return max(least, tokens)


def _cuda_budget_bytes(
    model: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> int:
    torch.cuda.empty_cache()  # cached but unused memory counts as used otherwise
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    limit = int(total * config.gpu_memory_utilization)
    return max(0, limit - used - activation_bytes(model, config, dtype))


def _available_bytes() -> int:
    available = int(psutil.virtual_memory().available)
    for limit_file, used_file in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # v1
    ):
        try:
            limit = Path("/sys/fs/cgroup", limit_file).read_text().strip()
            used = Path("/sys/fs/cgroup", used_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():
            available = min(available, max(0, int(limit) - int(used)))
    return available
