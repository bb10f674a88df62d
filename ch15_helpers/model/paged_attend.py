"""What a decoder layer does with its queries, keys and values when the KV cache is paged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.kv_quant import write_kv_quantised
from ch15_helpers.kernels.kv_write import write_kv
from ch15_helpers.kernels.paged_attention import paged_attention
from ch15_helpers.kernels.rope import apply_rope
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv


@dataclass(frozen=True)
class PagedAttend:
    """The attention of one layer over its pages.

    Attributes:
        k_cache, v_cache: the layer's, [num_blocks, block_size, num_kv_heads, head_dim].
        batch: the step's.
        scale: on the scores.
        backend: of :func:`paged_attention`.
        scales: of K and V, float32 [num_blocks, num_kv_heads], where the pages are quantised.
    """

    k_cache: Tensor
    v_cache: Tensor
    batch: BatchMetadata
    scale: float
    backend: str = "auto"
    scales: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes K and V into the pages and returns the attention of rotated q over them."""
        caches, batch = (self.k_cache, self.v_cache), self.batch
        if self.scales is None:
            write_kv(*caches, k, v, batch.slot_mapping, batch.scratch)
        else:
            write_kv_quantised(*caches, *self.scales, k, v, batch)
        return self._read(q)

    def rotated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin_cache: Tensor,
        positions: Tensor,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The same for q and k that are yet to be rotated: one launch less on a GPU."""
        if self.scales is not None:
            return self(*apply_rope(q, k, cos_sin_cache, positions, rows), v)
        batch = self.batch
        q = rope_and_write_kv(
            q, k, v, self.k_cache, self.v_cache, cos_sin_cache, positions,
            batch.slot_mapping, rows, batch.scratch,
        )  # fmt: skip
        return self._read(q)

    def _read(self, q: Tensor) -> Tensor:
        scales = self.scales or ()
        caches = self.k_cache, self.v_cache
        return paged_attention(q, *caches, self.batch, self.scale, self.backend, *scales)
