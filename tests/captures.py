"""Captured steps without a GPU.

A capture is played by a function that runs the same step again over the same buffers, so that
shapes, padding, shared outputs and token ids that are still on the device are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.graph_buffers import GraphBuffers, StepShape
from ch15_helpers.serving.graphs import StepGraphs
from ch15_helpers.serving.last_ids import LastIds, Launched
from ch15_helpers.serving.request import Request


class Replay:
    """Runs the step again, into the tensor that the capture returned."""

    def __init__(self, step: Callable[[], Tensor], result: Tensor, counts: dict[str, int]) -> None:
        self.step, self.result, self.counts = step, result, counts

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.counts["replays"] += 1
        self.result.copy_(self.step())


def play_captures(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """From now on captures are played. Returns a count of replays."""
    counts = {"replays": 0}
    inputs = StepGraphs._inputs

    def record(self: StepGraphs, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        result = step()
        return Replay(step, result, counts), result

    def fresh(self: StepGraphs, shape: StepShape) -> tuple[GraphBuffers, BatchMetadata]:
        """Buffers that drop with each batch what a CPU derives from its lengths."""
        buffers, metadata = inputs(self, shape)
        fill = buffers.fill

        def filled(batch: HostBatch) -> None:
            metadata.scratch.clear()
            fill(batch)

        monkeypatch.setattr(buffers, "fill", filled)
        return buffers, metadata

    def remember(self: LastIds, sampled: list[Request], ids: Tensor) -> Launched:
        """As on a GPU: the buffer that captured steps read stays where it is."""
        self._sampled = sampled
        if ids.data_ptr() != self.ids.data_ptr():
            self.ids[: len(ids)].copy_(ids)
        return Launched(ids.clone(), None)

    monkeypatch.setattr(LastIds, "remember", remember)
    monkeypatch.setattr(StepGraphs, "_record", record)
    monkeypatch.setattr(StepGraphs, "_inputs", fresh)
    # The reference takes lengths from tensors, as a kernel does in a graph.
    backend = "ch15_helpers.kernels.paged_attention.default_backend"
    monkeypatch.setattr(backend, lambda device: "reference")
    return counts
