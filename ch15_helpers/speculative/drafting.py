"""Drafts from a model, token by token, all requests of a batch together.

A pass takes its tokens from where the pass before has left them, on the device, so the host waits
once for a whole draft. On a GPU passes are captured, as the engine's own decode steps are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import Uploader
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.graph_buffers import StepShape
from ch15_helpers.serving.graphs import StepGraphs, can_capture
from ch15_helpers.serving.last_ids import LastIds, fill_in
from ch15_helpers.serving.request import INVALID_TOKEN, Request
from ch15_helpers.serving.sampling import greedy_ids, pick, token_weights, upload
from ch15_helpers.serving.warm_up import patiently
from ch15_helpers.speculative.rows import QueryRow, host_batch
from ch15_helpers.speculative.verify import DRAFT_STREAM, Draft, stream_uniform


@dataclass(slots=True)
class Drafting:
    """One request while its draft is made.

    Attributes:
        limit: tokens to draft.
        table: its blocks in the draft's pool.
        computed: tokens whose keys and values that pool has, or will when the passes have run.
        places: of each drafted token among those of all passes.
        row: of the last pass that was this request's.
        draft: the tokens, once the passes have run; fewer where logits were not finite.
        probs: of each, the distribution that it was drawn from.
    """

    request: Request
    limit: int
    table: list[int]
    computed: int
    places: list[int] = field(default_factory=list)
    row: int = 0
    draft: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def query(self) -> QueryRow:
        """What to compute next: the known tokens that are not computed, or the last draft."""
        known = self.request.num_tokens
        tokens = self.request.tokens(min(self.computed, known), known)
        return QueryRow(tokens or [-1 - self.row], self.computed, self.table)


class ModelProposer:
    """Drafts with a model. Use ``LayerSkipProposer`` or ``SmallModelProposer``.

    Attributes:
        model: who drafts.
        graphs: its captured passes, or None.
    """

    def __init__(
        self, model: Transformer, cache: PagedKVCache, attention_backend: str, sample: bool
    ) -> None:
        self.model = model
        self.graphs: StepGraphs | None = None
        self._cache, self._backend, self._sample = cache, attention_backend, sample
        self._uploader = Uploader(cache.device)
        self._ids = torch.zeros(0, dtype=torch.int64, device=cache.device)  # of the last pass

    def capture(self, config: EngineConfig) -> None:
        """Capture passes for an engine of this configuration, where that can be done."""
        if not config.capture_decode or not can_capture(self.model, self._backend):
            return
        last = LastIds(config.max_num_seqs, self._cache.device)
        longest = self.model.config.max_position_embeddings
        if config.max_model_len is not None:
            longest = min(longest, config.max_model_len)
        self.graphs = graphs = StepGraphs(
            self.model, self._cache, config.max_num_seqs, longest, last
        )
        self._ids = last.ids
        for shape in patiently(self._shapes(graphs), "capturing drafts"):
            graphs.capture([shape])

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Drafts of exactly ``limits[i]`` tokens, shorter where the draft's pool is full."""
        pairs = zip(requests, limits, strict=True)
        drafting = [self._begin(request, limit) for request, limit in pairs]
        begun = [one for one in drafting if one is not None]
        active, passes, count = begun, [torch.zeros(0, dtype=torch.int64)], 0
        while active:
            ids = self._pass(active)
            for row, one in enumerate(active):
                one.row = row
                one.places.append(count + row)
            count += len(active)
            passes.append(ids)
            active = [one for one in active if len(one.places) < one.limit]
        tokens: list[int] = torch.cat(passes[1:]).tolist() if count else []
        for one in begun:
            found = [tokens[place] for place in one.places]
            one.draft = found[: found.index(INVALID_TOKEN)] if INVALID_TOKEN in found else found
        return [self._finish(one) for one in drafting]

    def forget(self, request_id: str) -> None:
        """Drop what is kept about a request."""

    # ---- for subclasses --------------------------------------------------------------------

    def _begin(self, request: Request, limit: int) -> Drafting | None:
        raise AssertionError("subclasses know where the pages are")

    def _shapes(self, graphs: StepGraphs) -> list[StepShape]:
        """What to capture, largest first."""
        return graphs.decode_shapes()

    def _finish(self, one: Drafting | None) -> Draft:
        if one is None:
            return Draft()
        probs = one.probs[: len(one.draft)]
        return Draft(one.draft, torch.stack(probs) if probs else None)

    # ---- inside ----------------------------------------------------------------------------

    def _pass(self, active: Sequence[Drafting]) -> Tensor:
        """Compute what each is missing; the token after it, int64 [len(active)] on the device."""
        rows = [one.query() for one in active]
        for one, row in zip(active, rows, strict=True):
            one.computed += len(row.token_ids)
        last = np.cumsum([len(row.token_ids) for row in rows]) - 1
        host = host_batch(rows, last, self._cache.block_size)
        found = None if self.graphs is None else self.graphs.run(host)
        if found is None:
            tokens, positions, batch = self._uploader.upload(host)
            if (host.token_ids < 0).any():
                tokens = fill_in(tokens, self._ids)
            logits = self.model.forward(
                tokens, positions, self._cache.pages, batch, attention_backend=self._backend
            )
            found = logits, greedy_ids(logits)
        ids = self._choose(active, *found)
        if self.graphs is None:
            self._ids = ids
        elif ids.data_ptr() == self._ids.data_ptr():
            return ids.clone()  # the next pass writes there
        else:
            self._ids[: len(ids)].copy_(ids)
        return ids

    def _choose(self, active: Sequence[Drafting], logits: Tensor, greedy: Tensor) -> Tensor:
        """Greedy ids, or for sampled requests ones that are drawn; notes the distributions."""
        rows = [row for row, one in enumerate(active) if one.request.params.temperature > 0]
        if not rows or not self._sample:
            return greedy
        some = [active[row] for row in rows]
        index = upload(rows, logits.device, torch.int64)
        weights = token_weights(logits[index], [one.request for one in some])
        numbers = []
        for one, probs in zip(some, weights / weights.sum(-1, keepdim=True), strict=True):
            one.probs.append(probs)
            position = one.request.num_tokens + len(one.places)
            numbers.append(stream_uniform(DRAFT_STREAM, one.request.seed, position))
        drawn, first = pick(weights, numbers), greedy[index]
        drawn = torch.where(first == INVALID_TOKEN, INVALID_TOKEN, drawn)
        return greedy.index_copy(0, index, drawn)
