"""Runs a Step on the real model: block copies, inputs, forward, sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kv.blocks import BlockManager
from ch15_helpers.kv.cache import PagedKVCache, swap_blocks
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import BatchBuilder, HostBatch, Uploader
from ch15_helpers.serving.graphs import StepGraphs
from ch15_helpers.serving.last_ids import LastIds, Launched, fill_in
from ch15_helpers.serving.offload import Offload
from ch15_helpers.serving.sampling import sample_ids
from ch15_helpers.serving.step import Step

__all__ = ["Launched", "ModelRunner"]


class ModelRunner:
    """Owns the device side of a step; the scheduler's decisions are only carried out here.

    ``_execute`` (token ids, positions, metadata in; float32 logits out) is the seam for running
    the same step another way. Attributes: ``graphs``, captured steps, or None; ``offload``, the
    tiers below the device pool, or None; ``last_ids``, what the last step sampled.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedKVCache,
        blocks: BlockManager,
        host_cache: PagedKVCache | None = None,
        attention_backend: str = "auto",
        graphs: StepGraphs | None = None,
        max_num_seqs: int = 256,
    ) -> None:
        self.model = model
        self.graphs = graphs
        self.cache = cache
        self.host_cache = host_cache
        self.attention_backend = attention_backend
        self.offload: Offload | None = None
        self.last_ids = LastIds(max_num_seqs, cache.device)
        self._blocks = blocks
        self._builder = BatchBuilder(cache.block_size)
        self._uploader = Uploader(cache.device)

    @property
    def is_plain(self) -> bool:
        """Whether no subclass replaces a part of a step.

        Only then may a step be launched while another one runs.
        """
        seams = ("run", "_compute", "_execute")
        return all(getattr(type(self), seam) is getattr(ModelRunner, seam) for seam in seams)

    @property
    def captures_prompts(self) -> bool:
        """Whether steps with prompts may be replayed: then nobody sees their parts."""
        return self.is_plain

    @torch.inference_mode()
    def run(self, step: Step) -> list[int]:
        """Carry out a step.

        Returns:
            One token id for each request of ``step.sampled``, in that order; INVALID_TOKEN where
            the logits were not finite.
        """
        self._move_blocks(step)
        return [] if step.is_empty else self._compute(step)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched | None:
        """Start a step and do not wait for it; None for a step that computes nothing.

        Where a request's last token is a PENDING_TOKEN, the step launched last must have sampled
        it: its id is taken from the device.
        """
        self._move_blocks(step)
        return None if step.is_empty else self._start(step)

    def _compute(self, step: Step) -> list[int]:
        return self._start(step).tokens()

    def _start(self, step: Step) -> Launched:
        host = self._builder.build(step, self._blocks.tables, self.last_ids.rows)
        sampled = step.sampled
        captured = self._replay(host)
        if captured is not None:
            logits, greedy = captured
            return self.last_ids.remember(sampled, sample_ids(logits, sampled, greedy))
        token_ids, positions, batch = self._uploader.upload(host)
        if host.has_pending:
            token_ids = fill_in(token_ids, self.last_ids.ids)
        logits = self._execute(token_ids, positions, batch)
        return self.last_ids.remember(sampled, sample_ids(logits, sampled))

    def _replay(self, host: HostBatch) -> tuple[Tensor, Tensor] | None:
        """Logits and greedy ids of a captured step, if one fits."""
        graphs = self.graphs
        if graphs is None or not (host.is_decode or self.captures_prompts):
            return None
        return graphs.run(host)

    def _execute(self, token_ids: Tensor, positions: Tensor, batch: BatchMetadata) -> Tensor:
        """Forward pass: [N] ids and positions to [len(batch.logits_indices), vocab] logits."""
        return self.model.forward(
            token_ids,
            positions,
            self.cache.pages,
            batch,
            attention_backend=self.attention_backend,
            kv_scales=self.cache.scales,
        )

    def _move_blocks(self, step: Step) -> None:
        # In this order: what is read may be overwritten by what follows.
        if step.swap_out and self.host_cache is not None:
            swap_blocks(self.cache, self.host_cache, step.swap_out)
        if step.demotions and self.offload is not None:
            self.offload.demote(step.demotions, step.promotions)
        if step.copies:
            self.cache.copy_blocks(step.copies)
        if step.swap_in and self.host_cache is not None:
            swap_blocks(self.host_cache, self.cache, step.swap_in)
        if step.promotions and self.offload is not None:
            self.offload.promote(step.promotions)
