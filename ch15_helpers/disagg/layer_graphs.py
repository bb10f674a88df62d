"""Prompts captured layer by layer, so that somebody may act between two layers.

A prompt that is one graph shows nobody when a layer is done. Here each layer is a graph of its own:
the hidden states wait in fixed buffers between two of them, and whoever listens is told after each
launch. Launching a layer then takes the host some microseconds instead of half a millisecond, and
slices may be of any number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.sampling import sample_tokens
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.graph_buffers import StepShape
from ch15_helpers.serving.graphs import Captured, StepGraphs, greedy_params
from ch15_helpers.serving.last_ids import fill_in


@dataclass(frozen=True)
class _CapturedLayers(Captured):
    """``graph`` is the last layer, with the logits; these come before it."""

    earlier: tuple[torch.cuda.CUDAGraph, ...] = ()


class LayerGraphs(StepGraphs):
    """Captured prompts that can be watched. Decode steps are captured by ``StepGraphs``."""

    _streams: tuple[Tensor, Tensor] | None = None  # hidden states and residual, of any size

    @torch.inference_mode()
    def run_layers(
        self, batch: HostBatch, on_layer: Callable[[int], None]
    ) -> tuple[Tensor, Tensor] | None:
        """As ``run``, for any batch with prompts.

        Args:
            on_layer: called with each layer's index once that layer is launched.
        """
        shape, fitting = self._fit(batch)
        captured = None if shape is None else self._captured[shape]
        if not isinstance(captured, _CapturedLayers):
            return None
        captured.buffers.fill(fitting)
        for layer, graph in enumerate((*captured.earlier, captured.graph)):
            graph.replay()
            on_layer(layer)
        count = len(batch.logits_indices)
        return captured.logits[:count], captured.ids[:count]

    def capture(self, shapes: Iterable[StepShape]) -> None:
        """As for ``StepGraphs``, the largest first: it sets the size of the buffers."""
        todo = list(shapes)
        if todo and self._streams is None:
            model = self._model
            size = max(shape.tokens for shape in todo), model.config.hidden_size
            hidden = torch.zeros(size, dtype=model.dtype, device=model.device)
            self._streams = hidden, torch.zeros_like(hidden)
        super().capture(todo)

    def _fit(self, batch: HostBatch) -> tuple[StepShape | None, HostBatch]:
        """A prompt of one token is a prompt, too."""
        return self._fit_pieces(batch, self.prompt_sizes, self._prompt_shape)

    def _capture_one(self, shape: StepShape) -> Captured:
        model, cache = self._model, self._cache
        assert self._streams is not None
        hidden, residual = (stream[: shape.tokens] for stream in self._streams)
        buffers, metadata = self._inputs(shape)
        greedy, (_, ids) = greedy_params(shape.rows, model.device), self._outputs(shape)
        rows, last = buffers.logits_indices, model.config.num_hidden_layers - 1
        fewer = shape.rows < shape.tokens and not model.config.is_moe

        def through(index: int, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
            if index == 0:
                tokens = fill_in(buffers.token_ids, self._last.ids)
                hidden.copy_(embedding(tokens, model.embed_tokens))
            attend = model.paged_attend(index, cache.pages, metadata, kv_scales=cache.scales)
            return model.layers[index](
                hidden, residual if index else None, buffers.positions, model.cos_sin_cache,
                attend, None, wanted,
            )  # fmt: skip

        def layer(index: int) -> Tensor:
            new, rest = through(index, None)
            residual.copy_(rest)  # first: it may be what ``hidden`` holds
            return hidden.copy_(new)

        def ending() -> Tensor:
            out, rest = through(last, rows if fewer else None)
            out = rms_norm(out, model.final_norm, model.config.rms_norm_eps, rest)[0]
            logits = model.compute_logits(out if fewer else out.index_select(0, rows), wide=False)
            ids.copy_(sample_tokens(logits, *greedy))
            return logits

        earlier = tuple(self._record(partial(layer, index))[0] for index in range(last))
        graph, logits = self._record(ending)
        return _CapturedLayers(graph, buffers, metadata, logits, ids, greedy, earlier)
