"""Batches and tiny Hugging Face checkpoints that several test files build."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.cpu_library import cpu_library

ARCHITECTURES = ("llama", "qwen3", "qwen3_moe", "mixtral")
CPU_BACKENDS = ("reference", "sdpa", *(("compiled",) if cpu_library() is not None else ()))
BACKENDS = ("reference", "sdpa", "triton") if torch.cuda.is_available() else CPU_BACKENDS


def scrambled_tables(
    context_lens: Sequence[int], block_size: int, seed: int = 0
) -> tuple[list[list[int]], int]:
    """A block table per sequence, no two sharing a block, in random order; and the pool's size."""
    counts = [-(-n // block_size) for n in context_lens]
    num_blocks = sum(counts) + 3
    order = list(range(num_blocks))
    random.Random(seed).shuffle(order)
    return [[order.pop() for _ in range(count)] for count in counts], num_blocks


def make_batch(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
    device: str = "cpu",
) -> tuple[BatchMetadata, Tensor]:
    """Metadata of one step, and the positions of its tokens."""
    starts, slots, positions = [0], [], []
    for query_len, context_len, table in zip(query_lens, context_lens, tables, strict=True):
        starts.append(starts[-1] + query_len)
        for position in range(context_len - query_len, context_len):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    width = max(len(table) for table in tables)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    batch = BatchMetadata(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        logits_indices=torch.tensor([s - 1 for s in starts[1:]], device=device),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        query_lens_host=tuple(query_lens),
        context_lens_host=tuple(context_lens),
    )
    return batch, torch.tensor(positions, device=device)


def hf_config(architecture: str, **overrides: Any) -> Any:
    """A tiny transformers configuration whose dimensions are all different from each other."""
    import transformers

    kind = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}
    fields: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    if architecture == "qwen3_moe":
        fields |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    if architecture == "mixtral":
        fields |= {"num_local_experts": 5, "num_experts_per_tok": 2}
    return getattr(transformers, f"{kind[architecture]}Config")(**fields | overrides)


def save_tiny_hf(architecture: str, path: Path, max_shard_size: str = "1GB", **config: Any) -> Any:
    """Writes a random tiny checkpoint and returns the transformers model, float32 on the CPU.

    Every weight is random, the norms too: a norm that is skipped or swapped must change logits.
    """
    import transformers

    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(architecture, **config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
            else:
                weight.normal_(0.0, 2.0 * weight.shape[-1] ** -0.5)
    model.eval().save_pretrained(path, max_shard_size=max_shard_size)
    return model


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    difference = (value.double().cpu() - reference.double().cpu()).abs().max()
    return float(difference / reference.double().cpu().abs().max())
