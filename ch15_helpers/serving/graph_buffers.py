"""Fixed inputs of a captured step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.serving.batch_builder import HostBatch


@dataclass(frozen=True, slots=True)
class StepShape:
    """How large a captured step is.

    Attributes:
        tokens, seqs: of the flat batch, padding included.
        rows: logits that are computed.
        query_len: most tokens of one sequence; 0 for decode steps, where each sequence has one.
        verifies: the logits of every token are wanted, as drafts need them.
    """

    tokens: int
    seqs: int
    rows: int
    query_len: int
    verifies: bool = False

    @classmethod
    def decode(cls, num_seqs: int) -> StepShape:
        """One token for each sequence, all of them sampled."""
        return cls(num_seqs, num_seqs, num_seqs, 0)


class GraphBuffers:
    """Inputs of one captured step, in one allocation, so that a step needs one copy.

    Arrays lie one after another in the host's staging buffer and on the device alike: int64 token
    ids, positions, slots and sampled rows, then int32 query starts, context lengths and tables.
    """

    def __init__(self, shape: StepShape, max_blocks: int, device: torch.device) -> None:
        tokens, seqs = (shape.tokens,), (shape.seqs,)
        long, short = torch.int64, torch.int32
        self._fields = [
            *((tokens, long), (tokens, long), (tokens, long), ((shape.rows,), long)),
            *(((shape.seqs + 1,), short), (seqs, short), ((shape.seqs, max_blocks), short)),
        ]
        num_bytes = sum(math.prod(size) * dtype.itemsize for size, dtype in self._fields)
        on_gpu = device.type == "cuda"
        self.shape = shape
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._numpy = [view.numpy() for view in self._views(self.host)]
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        fields = self._views(self.device)
        self.token_ids, self.positions, self.slots, self.logits_indices = fields[:4]
        self.query_starts, self.context_lens, self.tables = fields[4:]
        self.slots.fill_(-1)
        self.query_starts.copy_(torch.arange(shape.seqs + 1).clamp(max=shape.tokens))

    def fill(self, batch: HostBatch) -> None:
        """Stage a batch, padded to the shape, and start its copy to the device.

        The copy before must be over. It waited for one step at the most, which has ended when the
        next but one is launched.
        """
        if self._copied is not None:
            self._copied.synchronize()
        count, seqs, rows = (len(x) for x in (batch.token_ids, batch.context_lens,
                                              batch.logits_indices))  # fmt: skip
        tokens, positions, slots, logits, starts, context_lens, tables = self._numpy
        tokens[:count], positions[:count] = batch.token_ids, batch.positions
        tokens[count:] = positions[count:] = 0
        slots[:count], slots[count:] = batch.slot_mapping, -1
        logits[:rows], logits[rows:] = batch.logits_indices, 0
        # A sequence of padding has one token of it, as long as there are any: its output is zero.
        starts[: seqs + 1] = batch.query_starts
        beyond = np.arange(1, len(starts) - seqs, dtype=np.int32)
        starts[seqs + 1 :] = np.minimum(count + beyond, len(tokens))
        context_lens[:seqs], context_lens[seqs:] = batch.context_lens, 0
        tables[:seqs, : batch.block_tables.shape[1]] = batch.block_tables
        self.device.copy_(self.host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _views(self, flat: Tensor) -> list[Tensor]:
        views, start = [], 0
        for size, dtype in self._fields:
            stop = start + math.prod(size) * dtype.itemsize
            views.append(flat[start:stop].view(dtype).view(size))
            start = stop
        return views
