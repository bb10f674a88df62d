"""From a Step to the tensors of one forward pass: numpy on the host, then one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.serving.request import PENDING_TOKEN, Request
from ch15_helpers.serving.step import ScheduledChunk, Step

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One step's inputs on the host. Sequences: decodes first, then chunks; see BatchMetadata.

    Attributes:
        has_pending: some token ids are ``-1 - row``, for what the last step samples in that row.
    """

    token_ids: Int64
    positions: Int64
    slot_mapping: Int64
    logits_indices: Int64
    query_starts: Int32
    context_lens: Int32
    block_tables: Int32
    query_lens: tuple[int, ...]
    has_pending: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token, and all are sampled."""
        return len(self.token_ids) == len(self.query_lens) == len(self.logits_indices)

    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """The arrays that the device needs, int64 ones first so that all stay aligned."""
        return (
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.logits_indices,
            self.query_starts,
            self.context_lens,
            self.block_tables,
        )


class BatchBuilder:
    """Builds HostBatches; keeps what does not change between two decode steps.

    ``step.decodes`` is the same list object as long as the set of decoding requests is the same,
    so the rows of their block tables are looked up once for the whole run of steps.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._decodes: list[Request] = []
        self._rows: Int64 = np.empty(0, dtype=np.int64)

    def build(
        self,
        step: Step,
        tables: Int32,
        last_rows: Callable[[Sequence[Request]], Int64] | None = None,
    ) -> HostBatch:
        """The inputs of a non-empty step.

        Args:
            step: what the scheduler decided.
            tables: block tables of all resident requests, one row each (BlockManager.tables).
            last_rows: where the last step samples for the requests whose last token is pending.
        """
        decodes = self._build_decodes(step.decodes, tables)
        if last_rows is not None:
            decodes = _refer(decodes, step.decodes, last_rows)
        if not step.chunks:
            return decodes
        return self._append_chunks(decodes, step.chunks, tables)

    def _build_decodes(self, requests: list[Request], tables: Int32) -> HostBatch:
        if requests is not self._decodes:
            self._decodes = requests
            self._rows = np.array([request.slot for request in requests], dtype=np.int64)
        count, block_size = len(requests), self.block_size
        tokens = np.array([request.output_token_ids[-1] for request in requests], dtype=np.int64)
        positions = np.array([request.num_computed_tokens for request in requests], dtype=np.int64)
        context_lens = (positions + 1).astype(np.int32)
        width = -(-int(context_lens.max()) // block_size) if count else 0
        block_tables = tables[:, :width][self._rows]
        logical, offset = np.divmod(positions, block_size)
        every = np.arange(count, dtype=np.int64)
        return HostBatch(
            token_ids=tokens,
            positions=positions,
            slot_mapping=block_tables[every, logical].astype(np.int64) * block_size + offset,
            logits_indices=every,
            query_starts=np.arange(count + 1, dtype=np.int32),
            context_lens=context_lens,
            block_tables=block_tables,
            query_lens=(1,) * count,
        )

    def _append_chunks(
        self, decodes: HostBatch, chunks: list[ScheduledChunk], tables: Int32
    ) -> HostBatch:
        block_size = self.block_size
        num_decodes = len(decodes.query_lens)
        lengths = [chunk.num_tokens for chunk in chunks]
        ends = np.array([chunk.start + chunk.num_tokens for chunk in chunks], dtype=np.int32)
        starts = num_decodes + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        width = max(decodes.block_tables.shape[1], -(-int(ends.max()) // block_size))
        rows = np.array([chunk.request.slot for chunk in chunks], dtype=np.int64)
        block_tables = np.zeros((num_decodes + len(chunks), width), dtype=np.int32)
        block_tables[:num_decodes, : decodes.block_tables.shape[1]] = decodes.block_tables
        block_tables[num_decodes:] = tables[:, :width][rows]
        tokens, positions, slots = [decodes.token_ids], [decodes.positions], [decodes.slot_mapping]
        for number, chunk in enumerate(chunks):
            end = chunk.start + chunk.num_tokens
            tokens.append(np.array(chunk.request.tokens(chunk.start, end), dtype=np.int64))
            where = np.arange(chunk.start, end, dtype=np.int64)
            logical, offset = np.divmod(where, block_size)
            positions.append(where)
            table = block_tables[num_decodes + number].astype(np.int64)
            slots.append(table[logical] * block_size + offset)
        last = [starts[i + 1] - 1 for i, chunk in enumerate(chunks) if chunk.is_last]
        return HostBatch(
            token_ids=np.concatenate(tokens),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate(slots),
            logits_indices=np.concatenate([decodes.logits_indices, np.array(last, dtype=np.int64)]),
            query_starts=np.concatenate([decodes.query_starts[:-1], starts]),
            context_lens=np.concatenate([decodes.context_lens, ends]),
            block_tables=block_tables,
            query_lens=(*decodes.query_lens, *lengths),
            has_pending=decodes.has_pending,
        )


def _refer(
    decodes: HostBatch,
    requests: Sequence[Request],
    last_rows: Callable[[Sequence[Request]], Int64],
) -> HostBatch:
    """Let pending tokens say in which row of the last step they are."""
    pending = decodes.token_ids == PENDING_TOKEN
    if not pending.any():
        return decodes
    token_ids = np.where(pending, -1 - last_rows(requests), decodes.token_ids)
    return replace(decodes, token_ids=token_ids, has_pending=True)


class Uploader:
    """Moves a HostBatch to the device: nothing to do on CPU, one pinned copy elsewhere.

    The staging buffer is reused, so each copy first waits for the one before it: a step in which
    nobody samples reads nothing back, and its copy may still be queued behind its kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def upload(self, host: HostBatch) -> tuple[Tensor, Tensor, BatchMetadata]:
        """Token ids, positions and metadata on the device."""
        arrays = host.arrays()
        if self.device.type == "cpu":
            tensors = [torch.from_numpy(array) for array in arrays]
        else:
            tensors = self._copy(arrays)
        tokens, positions, slot_mapping, logits_indices, query_starts, context_lens, tables = (
            tensors
        )
        context_lens_host = tuple(host.context_lens.tolist())
        batch = BatchMetadata(
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=tables,
            slot_mapping=slot_mapping,
            logits_indices=logits_indices,
            max_query_len=max(host.query_lens),
            max_context_len=max(context_lens_host),
            query_lens_host=host.query_lens,
            context_lens_host=context_lens_host,
        )
        return tokens, positions, batch

    def _copy(self, arrays: tuple[npt.NDArray[np.generic], ...]) -> list[Tensor]:
        if self._copied is not None:
            self._copied.synchronize()
        total = sum(array.nbytes for array in arrays)
        if self._staging.numel() < total:
            self._staging = torch.empty(2 * total, dtype=torch.uint8, pin_memory=True)
        staging = self._staging.numpy()
        start = 0
        for array in arrays:
            staging[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
            start += array.nbytes
        on_device = self._staging[:total].to(self.device, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        tensors, start = [], 0
        for array in arrays:
            dtype = torch.int64 if array.dtype == np.int64 else torch.int32
            part = on_device[start : start + array.nbytes].view(dtype)
            tensors.append(part.view(array.shape))
            start += array.nbytes
        return tensors
