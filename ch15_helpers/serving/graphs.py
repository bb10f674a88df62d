"""Steps captured as CUDA graphs: one launch from the host instead of hundreds.

Launching a step's kernels one by one takes the host about half a millisecond a layer, longer than
a device needs for a few hundred tokens. A graph replays them with a single launch, on condition
that no shape and no address changes: inputs are copied into fixed buffers, and a batch is padded
to the next captured size. Padding has context length 0 and slot -1, so that it reads and writes
no KV. Greedy ids are a part of the graph, and so is taking a token id from where the step before
has left it (see ``LastIds``); sampled requests use its logits.

Steps with prompts are captured, too, as far as launching takes longer than computing. In them a
chunk is cut into pieces of as many queries as the decode attention takes for one sequence, because
that kernel reads all lengths on the device. For the same reason a verification of drafts needs one
graph for each number of tokens, not for each mixture of draft lengths.

CUDA graphs for LLM decode: vLLM and gpt-fast (2023), both with a ladder of batch sizes.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.batch_split import cut
from ch15_helpers.kernels.kv_quant import writes_in_one_launch
from ch15_helpers.kernels.sampling import sample_tokens
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.graph_buffers import GraphBuffers, StepShape
from ch15_helpers.serving.last_ids import LastIds, fill_in

logger = logging.getLogger(__name__)

QUERY_ROWS = 64
"""(query, head of one KV head) rows that the decode attention takes for one sequence."""
_LAUNCH_S_PER_LAYER = 0.45e-3  # eager, measured on an H200's host
_FLOPS_PER_S = 600e12  # of a step's products there
_MAX_ATTENTION_BYTES = 1 << 29  # of K and V of one layer; each piece reads its whole context


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond.

    Padding wastes at most half of a small batch and an eighth of a large one.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 64, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def prompt_ladder(config: ModelConfig, max_num_batched_tokens: int) -> list[int]:
    """Token counts to capture for steps with prompts: 16, 32, 48, 64, 96, 128, 192 and so on.

    They end where computing takes longer than launching (or with the largest step): with
    SmolLM2's 30 narrow layers beyond any step, with Llama-3-8B's 32 wide ones at 512.
    """
    return _worth_capturing(config, _sizes(4), max_num_batched_tokens)


def verification_ladder(config: ModelConfig, max_tokens: int) -> list[int]:
    """Token counts to capture for verifications: doubling from 4 to 128, then 192, 256, 384 ….

    They end where those of prompts do. Up to a hundred tokens and more a step takes the time in
    which the weights are read, so that padding costs nothing.
    """
    return _worth_capturing(config, [4, 8, 16, 32, 64, *_sizes(7)], max_tokens)


def _sizes(first: int) -> list[int]:
    """Powers of two from ``2**first``, and what lies halfway between two of them."""
    return [size for n in range(first, 15) for size in (1 << n, 3 << (n - 1))]


def _worth_capturing(config: ModelConfig, sizes: list[int], max_tokens: int) -> list[int]:
    flops = 2 * config.num_parameters(active_only=True)
    worth = config.num_hidden_layers * _LAUNCH_S_PER_LAYER * _FLOPS_PER_S / flops
    most = min(int(worth), max_tokens)
    kept = [size for size in sizes if size < most]
    return [*kept, max_tokens] if most == max_tokens else kept


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


@dataclass(frozen=True)
class Captured:
    """A graph and every tensor whose address it holds: freed memory would be read on replay."""

    graph: torch.cuda.CUDAGraph
    buffers: GraphBuffers
    batch: BatchMetadata
    logits: Tensor
    ids: Tensor
    params: tuple[Tensor, ...]


class StepGraphs:
    """Captured steps of one model over one KV pool.

    Attributes:
        sizes: batch sizes of decode steps that are captured, ascending; empty when none fitted in
            memory.
        prompt_sizes: token counts of steps with prompts that are captured, ascending.
        verification_sizes: token counts of verifications that are captured, ascending.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedKVCache,
        max_num_seqs: int,
        max_model_len: int,
        last_ids: LastIds,
    ) -> None:
        self._model, self._cache, self._last = model, cache, last_ids
        self._max_num_seqs = max_num_seqs
        self._max_blocks = min(cache.num_blocks, -(-max_model_len // cache.block_size))
        config = model.config
        group = config.num_attention_heads // config.num_key_value_heads
        self._query_len = max(1, QUERY_ROWS // group)
        kv_bytes = 2 * config.num_key_value_heads * config.head_dim * cache.pages.element_size()
        self._max_context = _MAX_ATTENTION_BYTES // kv_bytes
        self._captured: dict[StepShape, Captured] = {}
        self._pool: Any = None
        self._verified: tuple[Tensor, Tensor] | None = None  # logits and ids, of any verification
        self._longest = 0  # draft
        self.sizes: list[int] = []
        self.prompt_sizes: list[int] = []
        self.verification_sizes: list[int] = []

    def decode_shapes(self) -> list[StepShape]:
        """What to capture for decode steps, largest first: smaller ones reuse its memory."""
        return [StepShape.decode(size) for size in ladder(self._max_num_seqs)[::-1]]

    def prompt_shapes(self, max_num_batched_tokens: int) -> list[StepShape]:
        """What to capture for steps with prompts, largest first."""
        cache = self._cache
        if cache.scales is not None and not writes_in_one_launch(cache.dtype, cache.device):
            return []
        sizes = prompt_ladder(self._model.config, max_num_batched_tokens)
        return [self._prompt_shape(size) for size in sizes[::-1]]

    def verification_shapes(self, longest: int, max_num_batched_tokens: int) -> list[StepShape]:
        """What to capture for drafts of up to ``longest`` tokens, largest first.

        A longer ``longest`` than before replaces the verifications that were captured for it.
        """
        self._longest = longest
        self._captured = {k: v for k, v in self._captured.items() if not k.verifies}
        self._pool = self._pool if self._captured else None  # it goes with its last graph
        self.verification_sizes = []
        most = min(self._max_num_seqs * (1 + longest), max_num_batched_tokens)
        sizes = verification_ladder(self._model.config, most)
        return [self._verification_shape(size) for size in sizes[::-1]]

    @torch.inference_mode()
    def capture(self, shapes: Iterable[StepShape]) -> None:
        """Capture some steps. Those that do not fit in memory are left out and run uncaptured."""
        for shape in shapes:
            try:
                self._captured[shape] = self._capture_one(shape)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                logger.warning("no memory to capture steps of %d tokens", shape.tokens)
                continue
        done, several = self._captured, [shape for shape in self._captured if shape.query_len]
        self.sizes = sorted(shape.tokens for shape in done if shape.query_len == 0)
        self.prompt_sizes = sorted(shape.tokens for shape in several if not shape.verifies)
        self.verification_sizes = sorted(shape.tokens for shape in several if shape.verifies)

    def run(self, batch: HostBatch) -> tuple[Tensor, Tensor] | None:
        """Replay the step of the next larger size, if there is one.

        Returns:
            logits [rows, vocab] in the model's type and greedy ids int64 [rows] (INVALID_TOKEN
            where the logits are not finite) of the sampled rows. The logits are overwritten by the
            next replay of the same size, the ids by any; the ids are those of ``LastIds``. Those
            of verifications, float32, are overwritten by the next one, and are nowhere else.
        """
        shape, fitting = self._fit(batch)
        if shape is None:
            return None
        captured = self._captured[shape]
        captured.buffers.fill(fitting)
        captured.graph.replay()
        count = len(batch.logits_indices)
        return captured.logits[:count], captured.ids[:count]

    # ---- inside ----------------------------------------------------------------------------

    def _prompt_shape(self, tokens: int) -> StepShape:
        pieces = self._max_num_seqs + -(-tokens // self._query_len)
        return StepShape(tokens, min(tokens, pieces), self._max_num_seqs, self._query_len)

    def _verification_shape(self, tokens: int) -> StepShape:
        query_len = min(1 + self._longest, self._query_len, tokens)
        pieces = self._max_num_seqs * -(-(1 + self._longest) // query_len)
        return StepShape(tokens, min(tokens, pieces), tokens, query_len, verifies=True)

    def _fit(self, batch: HostBatch) -> tuple[StepShape | None, HostBatch]:
        """The smallest captured step that holds a batch, and the batch as that step needs it."""
        if batch.is_decode:
            return self._smallest(batch, self.sizes, StepShape.decode), batch
        if len(batch.logits_indices) > len(batch.query_lens):
            return self._fit_pieces(batch, self.verification_sizes, self._verification_shape)
        return self._fit_pieces(batch, self.prompt_sizes, self._prompt_shape)

    def _smallest(
        self, batch: HostBatch, sizes: list[int], make: Callable[[int], StepShape]
    ) -> StepShape | None:
        number = bisect_left(sizes, len(batch.token_ids))
        if number == len(sizes) or batch.block_tables.shape[1] > self._max_blocks:
            return None
        return make(sizes[number])

    def _fit_pieces(
        self, batch: HostBatch, sizes: list[int], make: Callable[[int], StepShape]
    ) -> tuple[StepShape | None, HostBatch]:
        shape = self._smallest(batch, sizes, make)
        if shape is None:
            return None, batch
        pieces = in_pieces(batch, shape.query_len)
        fits = len(pieces.query_lens) <= shape.seqs and len(batch.logits_indices) <= shape.rows
        return (shape if fits and pieces.context_lens.sum() <= self._max_context else None), pieces

    def _outputs(self, shape: StepShape) -> tuple[Tensor | None, Tensor]:
        """Where a captured step leaves logits (None: in memory of its own) and greedy ids."""
        if not shape.verifies:
            return None, self._last.ids[: shape.rows]
        rows, device = shape.rows, self._model.device
        if self._verified is None or len(self._verified[1]) < rows:
            logits = torch.empty(rows, self._model.config.vocab_size, device=device)
            self._verified = logits, torch.zeros(rows, dtype=torch.int64, device=device)
        return self._verified[0][:rows], self._verified[1][:rows]

    def _inputs(self, shape: StepShape) -> tuple[GraphBuffers, BatchMetadata]:
        buffers = GraphBuffers(shape, self._max_blocks, self._model.device)
        return buffers, BatchMetadata(
            query_starts=buffers.query_starts,
            context_lens=buffers.context_lens,
            block_tables=buffers.tables,
            slot_mapping=buffers.slots,
            logits_indices=buffers.logits_indices,
            max_query_len=max(1, shape.query_len),
            max_context_len=self._max_blocks * self._cache.block_size,
        )

    def _capture_one(self, shape: StepShape) -> Captured:
        cache = self._cache
        buffers, metadata = self._inputs(shape)
        greedy = greedy_params(shape.rows, self._model.device)
        kept, ids = self._outputs(shape)

        def step() -> Tensor:
            logits = self._model.forward(
                fill_in(buffers.token_ids, self._last.ids),
                buffers.positions,
                cache.pages,
                metadata,
                kv_scales=cache.scales,
                wide=False,
            )
            ids.copy_(sample_tokens(logits, *greedy))
            # Logits of verifications are many: all of these share what the largest one needs.
            return logits if kept is None else kept.copy_(logits)

        graph, logits = self._record(step)
        return Captured(graph, buffers, metadata, logits, ids, greedy)

    def _record(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of what a function launches, and where its result will be."""
        # Kernels compile and libraries make their handles outside the graph.
        device = self._model.device
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool):
            result = step()
        self._pool = graph.pool()
        return graph, result


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector out of a capture: an old engine's graphs, freed then, break it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def greedy_params(rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Temperatures, top-k, top-p, seeds and offsets for ``sample_tokens`` to be greedy."""
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    return zeros.double(), zeros.int(), zeros.double() + 1, zeros, zeros


def in_pieces(batch: HostBatch, query_len: int) -> HostBatch:
    """The same tokens as sequences of at most ``query_len`` queries each."""
    seq, lens, contexts = cut(np.array(batch.query_lens), batch.context_lens, query_len)
    return HostBatch(
        token_ids=batch.token_ids,
        positions=batch.positions,
        slot_mapping=batch.slot_mapping,
        logits_indices=batch.logits_indices,
        query_starts=np.concatenate(([0], np.cumsum(lens))).astype(np.int32),
        context_lens=contexts.astype(np.int32),
        block_tables=batch.block_tables[seq],
        query_lens=tuple(lens.tolist()),
        has_pending=batch.has_pending,
    )
