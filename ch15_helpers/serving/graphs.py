"""Decode steps captured as CUDA graphs: one launch from the host instead of hundreds.

A step of one token per sequence is short, and launching its kernels one by one takes the host
longer than the device needs to run them. A graph replays them with a single launch, on condition
that no shape and no address changes: inputs are copied into fixed buffers, and a batch is padded
to the next captured size. Padding rows have context length 0 and slot -1, so that they read and
write no KV. Greedy ids are part of the graph; sampled requests use its logits.

CUDA graphs for LLM decode: vLLM and gpt-fast (2023), both with a ladder of batch sizes.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.sampling import greedy_ids

logger = logging.getLogger(__name__)


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond.

    Padding wastes at most half of a small batch and an eighth of a large one.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 64, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def can_capture(model: Transformer, attention_backend: str) -> bool:
    """Whether a decode step of this model can be captured.

    Without its Triton kernels a mixture of experts asks the host which experts to run, and only
    the Triton attention reads its lengths on the device.
    """
    return (
        model.device.type == "cuda"
        and all(layer.mlp.can_capture for layer in model.layers)
        and attention_backend in ("auto", "triton")
    )


class _Buffers:
    """Fixed inputs of all graphs, in one allocation, so that a step needs one copy.

    Rows come first in the host's staging buffer and on the device alike: int64 token ids,
    positions and slots, then int32 context lengths and block tables.
    """

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        self.rows, self.max_blocks = rows, max_blocks
        num_bytes = rows * (3 * 8 + 4 + 4 * max_blocks)
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._numpy = [view.numpy() for view in self._views(self.host)]
        on_device = self._views(self.device)
        self.token_ids, self.positions, self.slots, self.context_lens, self.tables = on_device

    def _views(self, flat: Tensor) -> list[Tensor]:
        row, table = (self.rows,), (self.rows, self.max_blocks)
        shapes = [(row, torch.int64)] * 3 + [(row, torch.int32), (table, torch.int32)]
        views, start = [], 0
        for shape, dtype in shapes:
            stop = start + math.prod(shape) * dtype.itemsize
            views.append(flat[start:stop].view(dtype).view(shape))
            start = stop
        return views

    def fill(self, batch: HostBatch) -> None:
        """Stage a decode batch, padded to ``rows``, and start its copy to the device."""
        count = len(batch.query_lens)
        tokens, positions, slots, context_lens, tables = self._numpy
        tokens[:count], positions[:count] = batch.token_ids, batch.positions
        slots[:count], slots[count:] = batch.slot_mapping, -1
        context_lens[:count], context_lens[count:] = batch.context_lens, 0
        tables[:count, : batch.block_tables.shape[1]] = batch.block_tables
        tokens[count:] = positions[count:] = 0
        self.device.copy_(self.host, non_blocking=True)


@dataclass(frozen=True)
class _Captured:
    """A graph and every tensor whose address it holds: freed memory would be read on replay."""

    graph: torch.cuda.CUDAGraph
    buffers: _Buffers
    batch: BatchMetadata
    logits: Tensor
    ids: Tensor


class DecodeGraphs:
    """Captured decode steps of one model over one KV pool.

    Attributes:
        sizes: batch sizes that are captured, ascending; empty when none fitted in memory.
    """

    def __init__(
        self,
        model: Transformer,
        pages: Tensor,
        max_num_seqs: int,
        max_model_len: int,
        kv_scales: Tensor | None = None,
    ) -> None:
        self._model, self._pages, self._kv_scales = model, pages, kv_scales
        self._max_blocks = min(pages.shape[0], -(-max_model_len // pages.shape[3]))
        self._captured: dict[int, _Captured] = {}
        self.sizes: list[int] = []
        self._wanted = ladder(max_num_seqs)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, largest first so that the smaller ones reuse its memory.

        Sizes that do not fit in the device's memory are left out: such batches run uncaptured.
        """
        pool = None
        for size in track(self._wanted[::-1], "capturing decode steps", transient=True):
            try:
                captured = self._capture_one(size, pool)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                logger.warning("no memory to capture decode steps of %d sequences", size)
                continue
            self._captured[size] = captured
            pool = captured.graph.pool()
        self.sizes = sorted(self._captured)

    def fits(self, batch: HostBatch) -> bool:
        """Whether a captured step can run this batch: decodes only, and not too many."""
        num_seqs = len(batch.query_lens)
        return (
            bool(self.sizes)
            and num_seqs <= self.sizes[-1]
            and len(batch.token_ids) == num_seqs == len(batch.logits_indices)
            and batch.block_tables.shape[1] <= self._max_blocks
        )

    def run(self, batch: HostBatch) -> tuple[Tensor, Tensor]:
        """Replay the step of the next larger size.

        Returns:
            logits float32 [num_seqs, vocab] and greedy ids int64 [num_seqs] (INVALID_TOKEN where
            the logits are not finite), both overwritten by the next replay of the same size.
        """
        num_seqs = len(batch.query_lens)
        captured = self._captured[self.sizes[bisect_left(self.sizes, num_seqs)]]
        captured.buffers.fill(batch)
        captured.graph.replay()
        return captured.logits[:num_seqs], captured.ids[:num_seqs]

    def _capture_one(self, size: int, pool: Any) -> _Captured:
        device = self._model.device
        buffers = _Buffers(size, self._max_blocks, device)
        buffers.slots.fill_(-1)
        every = torch.arange(size + 1, device=device)
        metadata = BatchMetadata(
            query_starts=every.int(),
            context_lens=buffers.context_lens,
            block_tables=buffers.tables,
            slot_mapping=buffers.slots,
            logits_indices=every[:size],
            max_query_len=1,
            max_context_len=self._max_blocks * self._pages.shape[3],
        )

        def step() -> tuple[Tensor, Tensor]:
            logits = self._model.forward(
                buffers.token_ids,
                buffers.positions,
                self._pages,
                metadata,
                kv_scales=self._kv_scales,
            )
            return logits, greedy_ids(logits)

        # Kernels compile and libraries make their handles outside the graph.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, ids = step()
        return _Captured(graph, buffers, metadata, logits, ids)
