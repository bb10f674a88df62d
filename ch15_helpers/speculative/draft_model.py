"""Drafts from a model: the first layers of the target itself, or a smaller model.

The first layers compute exactly the keys and values that the target's pool holds already, so a
draft by layer skipping shares the target's pages and blocks and needs no prefill (LayerSkip,
Elhoushi et al., ACL 2024). A smaller model has a pool of its own; it catches up with tokens that it
has not seen, and goes back where its guesses were rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.kv.blocks import BlockManager
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.graph_buffers import StepShape
from ch15_helpers.serving.graphs import StepGraphs
from ch15_helpers.serving.request import Request
from ch15_helpers.speculative.drafting import Drafting, ModelProposer
from ch15_helpers.speculative.rows import QueryRow, host_batch
from ch15_helpers.speculative.verify import Draft

__all__ = ["LayerSkipProposer", "ModelProposer", "SmallModelProposer", "first_layers"]

_TOKENS_AT_ONCE = 2048


def first_layers(model: Transformer, num_layers: int) -> Transformer:
    """The first layers of a model with its final norm and head; weights are shared.

    Raises:
        ValueError: the model has no such number of layers.
    """
    total = model.config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must be in 1..{total}, got {num_layers}")
    short = copy.copy(model)
    short.config = replace(model.config, num_hidden_layers=num_layers)
    short.layers = model.layers[:num_layers]
    return short


class LayerSkipProposer(ModelProposer):
    """The target's first layers, over the target's own pages."""

    def __init__(
        self,
        target: Transformer,
        num_layers: int,
        cache: PagedKVCache,
        blocks: BlockManager,
        *,
        attention_backend: str = "auto",
        sample: bool = True,
    ) -> None:
        """Draft with ``num_layers`` layers.

        Args:
            cache, blocks: the target engine's. Blocks for the draft must be there already.
            sample: sampled requests get sampled drafts; False drafts greedily for all.
        """
        super().__init__(first_layers(target, num_layers), cache, attention_backend, sample)
        self._blocks = blocks

    def _begin(self, request: Request, limit: int) -> Drafting | None:
        if limit < 1:
            return None
        table = self._blocks.table(request.request_id)
        return Drafting(request, limit, table, request.num_computed_tokens)


@dataclass(slots=True)
class _Seen:
    """What the draft's pool holds of a request: its first tokens, then drafts."""

    num_tokens: int
    draft: list[int]

    def still_right(self, request: Request) -> int:
        """How many of the tokens that were computed are the request's own."""
        later = request.tokens(self.num_tokens, min(request.num_tokens, self.num_tokens + 64))
        count = 0
        while count < min(len(self.draft), len(later)) and self.draft[count] == later[count]:
            count += 1
        return self.num_tokens + count


class SmallModelProposer(ModelProposer):
    """A smaller model with the target's vocabulary and a pool of its own."""

    def __init__(
        self,
        model: Transformer,
        target: Transformer,
        num_blocks: int,
        block_size: int = 16,
        *,
        attention_backend: str = "auto",
        sample: bool = True,
    ) -> None:
        """Allocate the draft's pool.

        Args:
            num_blocks: of the draft's own pool. A request that finds no room goes without drafts,
                or takes the room of the one that drafted least recently.
            sample: sampled requests get sampled drafts; False drafts greedily for all.

        Raises:
            InvalidRequestError: the vocabularies differ.
        """
        if model.config.vocab_size != target.config.vocab_size:
            raise InvalidRequestError(
                f"the draft model has {model.config.vocab_size} tokens, the target "
                f"{target.config.vocab_size}; both must have the same vocabulary"
            )
        cache = PagedKVCache(
            model.config, num_blocks, block_size, dtype=model.dtype, device=model.device
        )
        super().__init__(model, cache, attention_backend, sample)
        self.blocks = BlockManager(num_blocks, block_size)
        self._seen: dict[str, _Seen] = {}  # least recently used first
        self._busy: set[str] = set()

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Drafts of at most ``limits[i]`` tokens; none where the draft's pool is full."""
        self._busy = set()
        return super().propose(requests, limits)

    def forget(self, request_id: str) -> None:
        """Give the request's blocks back."""
        if self._seen.pop(request_id, None) is not None:
            self.blocks.free(request_id)

    def check_invariants(self) -> None:
        """Raise AssertionError when blocks leak."""
        self.blocks.check_invariants()
        assert self.blocks.num_seqs == len(self._seen), "a table without a request"

    def _begin(self, request: Request, limit: int) -> Drafting | None:
        # The last draft is never computed, as nothing is drafted after it.
        wanted = request.num_tokens + limit - 1
        longest = self.model.config.max_position_embeddings
        if limit < 1 or wanted > longest or not self._make_room(request, wanted):
            return None
        name = request.request_id
        seen = self._seen.pop(name, None)
        computed = 0 if seen is None else min(seen.still_right(request), request.num_tokens - 1)
        self.blocks.ensure(name, wanted, wanted - computed)
        self._seen[name] = _Seen(computed, [])
        self._busy.add(name)
        one = Drafting(request, limit, self.blocks.table(name), computed)
        self._catch_up(one)
        return one

    def _shapes(self, graphs: StepGraphs) -> list[StepShape]:
        """Also what catches up: with a prompt, or with a token that was accepted unseen."""
        return graphs.prompt_shapes(_TOKENS_AT_ONCE) + graphs.decode_shapes()

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Whether the blocks can be had, from requests that drafted least recently if need be."""
        name = request.request_id
        if self.blocks.blocks_for(num_tokens) > self.blocks.allocator.num_total:
            return False
        while not self.blocks.can_grow(name, num_tokens):
            others = (key for key in self._seen if key != name and key not in self._busy)
            victim = next(others, None)
            if victim is None:
                return False
            self.forget(victim)
        return True

    def _catch_up(self, one: Drafting) -> None:
        """Bound the first pass: a long prompt is computed in pieces."""
        request = one.request
        while request.num_tokens - one.computed > _TOKENS_AT_ONCE:
            stop = one.computed + _TOKENS_AT_ONCE
            row = QueryRow(request.tokens(one.computed, stop), one.computed, one.table)
            host = host_batch([row], np.array([len(row.token_ids) - 1]), self._cache.block_size)
            tokens, positions, batch = self._uploader.upload(host)
            self.model.forward_hidden(
                tokens, positions, self._cache.pages, batch, attention_backend=self._backend
            )
            one.computed = stop

    def _finish(self, one: Drafting | None) -> Draft:
        if one is not None:
            name, known = one.request.request_id, one.request.num_tokens
            self._seen[name] = _Seen(known, one.draft[: max(0, one.computed - known)])
        return super()._finish(one)
