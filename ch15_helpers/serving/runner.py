"""Runs a Step on the real model: block copies, inputs, forward, sampling."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kv.blocks import BlockManager
from ch15_helpers.kv.cache import PagedKVCache, swap_blocks
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import BatchBuilder, Uploader
from ch15_helpers.serving.graphs import DecodeGraphs
from ch15_helpers.serving.offload import Offload
from ch15_helpers.serving.sampling import sample
from ch15_helpers.serving.step import Step


class ModelRunner:
    """Owns the device side of a step; the scheduler's decisions are only carried out here.

    ``_execute`` (token ids, positions, metadata in; float32 logits out) is the seam for running
    the same step another way. Attributes: ``graphs``, captured decode steps, or None;
    ``offload``, the tiers below the device pool, or None; ``on_layer_done``, called with each
    layer's index once its K and V are in the pages (not by captured steps), or None.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedKVCache,
        blocks: BlockManager,
        host_cache: PagedKVCache | None = None,
        attention_backend: str = "auto",
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.graphs = graphs
        self.cache = cache
        self.host_cache = host_cache
        self.attention_backend = attention_backend
        self.offload: Offload | None = None
        self.on_layer_done: Callable[[int], None] | None = None
        self._blocks = blocks
        self._builder = BatchBuilder(cache.block_size)
        self._uploader = Uploader(cache.device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[int]:
        """Carry out a step.

        Returns:
            One token id for each request of ``step.sampled``, in that order; INVALID_TOKEN where
            the logits were not finite.
        """
        self._move_blocks(step)
        return [] if step.is_empty else self._compute(step)

    def _compute(self, step: Step) -> list[int]:
        host = self._builder.build(step, self._blocks.tables)
        if self.graphs is not None and self.graphs.fits(host):
            logits, greedy = self.graphs.run(host)
            return sample(logits, step.sampled, greedy)
        logits = self._execute(*self._uploader.upload(host))
        sampled = step.sampled
        return sample(logits, sampled) if sampled else []

    @torch.inference_mode()
    def warm_up(self, max_num_seqs: int) -> None:
        """Compile what decode steps and mixed steps run, so that no request waits for it.

        Kernels are compiled once for up to 64 sequences and again for each power of two beyond.
        The padding slots of these batches write nothing to the cache.
        """
        counts = [1] + [1 << n for n in range(7, max_num_seqs.bit_length() + 1)]
        for num_seqs, query_len in itertools.product(counts, (1, 2)):
            self._execute(*self._padding_batch(num_seqs, query_len))

    def _padding_batch(self, num_seqs: int, query_len: int) -> tuple[Tensor, Tensor, BatchMetadata]:
        new = partial(torch.full, device=self.cache.device)
        tokens = new((num_seqs * query_len,), 0)
        starts = torch.arange(0, len(tokens) + 1, query_len, dtype=torch.int32)
        batch = BatchMetadata(
            query_starts=starts.to(self.cache.device),
            context_lens=new((num_seqs,), query_len, dtype=torch.int32),
            block_tables=new((num_seqs, 1), 0, dtype=torch.int32),
            slot_mapping=new((len(tokens),), -1),
            logits_indices=new((1,), 0),
            max_query_len=query_len,
            max_context_len=query_len,
            query_lens_host=(query_len,) * num_seqs,
            context_lens_host=(query_len,) * num_seqs,
        )
        return tokens, tokens, batch

    def _execute(self, token_ids: Tensor, positions: Tensor, batch: BatchMetadata) -> Tensor:
        """Forward pass: [N] ids and positions to [len(batch.logits_indices), vocab] logits."""
        return self.model.forward(
            token_ids,
            positions,
            self.cache.pages,
            batch,
            attention_backend=self.attention_backend,
            on_layer_done=self.on_layer_done,
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
