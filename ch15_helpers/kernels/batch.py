"""What every attention kernel must know about one step's batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BatchMetadata:
    """One varlen batch: prefill chunks and single-token decodes side by side.

    Tensors live on the model's device. ``S`` sequences, ``N`` tokens in all.

    Attributes:
        query_starts: int32 [S + 1], where each sequence's tokens start in the flat batch.
        context_lens: int32 [S], tokens in the KV cache once this step has written its own.
        block_tables: int32 [S, max_blocks], physical block of each logical block, padded with 0.
        slot_mapping: int64 [N], ``block * block_size + offset`` where each token's K and V go;
            -1 marks padding, which is not written.
        logits_indices: int64 [R], rows of the flat batch whose logits are wanted.
        max_query_len: most tokens that one sequence has in this step.
        max_context_len: largest entry of ``context_lens``.
        query_lens_host, context_lens_host: the same lengths as Python ints, so that CPU backends
            need no copy back; empty in a captured graph, where only tensors may be read.
        scratch: what a backend derives once per step and reuses in every layer (masks, gather
            rows). It starts empty and belongs to the backend.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    logits_indices: Tensor
    max_query_len: int
    max_context_len: int
    query_lens_host: tuple[int, ...] = ()
    context_lens_host: tuple[int, ...] = ()
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch, padding included."""
        return self.context_lens.shape[0]

    @property
    def decode_only(self) -> bool:
        """Whether every sequence has exactly one token (a captured step needs that)."""
        return self.max_query_len == 1
