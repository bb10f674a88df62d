"""A model whose next token is a hash of everything that it reads from the KV cache.

It writes token and position where the batch says, reads every context back through the block
table, and fails loudly when a position is not where it should be. Any block that was lost, mixed
up, overwritten or not copied therefore changes the tokens, and the right tokens are known without
any model: ``expected_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.model.config import ModelConfig

VOCAB = 97


def next_token(tokens: Sequence[int]) -> int:
    """The hash: depends on every token and on their order."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 10007
    return state % VOCAB


def expected_tokens(
    prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = (), model_len: int = 10**9
) -> list[int]:
    """What greedy decoding of HashModel must give."""
    known = list(prompt)
    while True:
        known.append(next_token(known))
        output = known[len(prompt) :]
        if output[-1] in stop or len(output) >= max_tokens or len(known) >= model_len:
            return output


class HashModel:
    """Stands in for a Transformer.

    Attributes:
        failures: how many of the next forward passes raise.
        nan_for: the logits of a row whose next token this is contain a NaN.
    """

    def __init__(self, max_position_embeddings: int = 512) -> None:
        from ch15_helpers.model.config import TINY

        self.config: ModelConfig = replace(
            TINY,
            vocab_size=VOCAB,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=max_position_embeddings,
            eos_token_ids=(),
        )
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.tokenizer = None
        self.source = "hash"
        self.failures = 0
        self.nan_for: int | None = None

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        pages: Tensor,
        batch: BatchMetadata,
        *,
        attention_backend: str = "auto",
        kv_scales: torch.Tensor | None = None,
    ) -> Tensor:
        block_size = pages.shape[3]
        assert len(set(batch.slot_mapping.tolist())) == len(token_ids), "two writers of one slot"
        block, offset = batch.slot_mapping // block_size, batch.slot_mapping % block_size
        if self.failures:
            self.failures -= 1
            pages[block, :, :, offset] = -1.0  # garbage where the step was to write
            raise RuntimeError("injected failure")
        pages[block, 0, 0, offset, 0, 0] = token_ids.float()
        pages[block, 0, 1, offset, 0, 0] = positions.float()
        answers: dict[int, int] = {}
        for number, length in enumerate(batch.context_lens.tolist()):
            where = torch.arange(length)
            table = batch.block_tables[number].long()[where // block_size]
            known = pages[table, 0, 0, where % block_size, 0, 0].long().tolist()
            found = pages[table, 0, 1, where % block_size, 0, 0].long()
            assert torch.equal(found, where), f"sequence {number}: positions {found.tolist()}"
            answers[int(batch.query_starts[number + 1]) - 1] = next_token(known)
        rows = batch.logits_indices.tolist()
        logits = torch.zeros(len(rows), VOCAB)
        for row, index in enumerate(rows):
            logits[row, answers[index]] = 1.0
            if answers[index] == self.nan_for:
                logits[row, 5] = torch.nan
        return logits


class FakeTransfer:
    """A promotion that ends after some polls, or when somebody waits for it.

    Until then its blocks hold garbage, as a device's do while a copy is under way.
    """

    def __init__(self, store: FakeStore, pairs: Sequence[tuple[BlockKey, int]]) -> None:
        self.pairs = list(pairs)
        self.ok = [False] * len(self.pairs)
        self.done = False
        self.polls_left = store.delay
        self._store = store
        for _, block in self.pairs:
            store.cache.pages[block] = -1.0

    def wait(self) -> None:
        self._store.num_waits += 1
        self.finish()

    def finish(self) -> None:
        if self.done:
            return
        self.done = True
        for i, (key, block) in enumerate(self.pairs):
            if key in self._store.blocks and not self._store.fails():
                self._store.cache.pages[block] = self._store.blocks[key]
                self.ok[i] = True


class FakeStore:
    """A tier in a dictionary, bounded, oldest out first.

    Attributes:
        delay: polls until a promotion ends; fails: whether the next block of one is lost.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        num_blocks: int = 10**9,
        *,
        delay: int = 0,
        fails: Callable[[], bool] = lambda: False,
    ) -> None:
        self.cache = cache
        self.num_blocks = num_blocks
        self.delay = delay
        self.fails = fails
        self.blocks: dict[BlockKey, Tensor] = {}
        self.under_way: list[FakeTransfer] = []
        self.num_waits = 0
        self.closed = False

    def num_leading(self, keys: Sequence[BlockKey]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.blocks), len(keys))

    def demote(self, pairs: Sequence[tuple[int, BlockKey]], keep: Sequence[BlockKey] = ()) -> None:
        for block, key in pairs:
            self.blocks[key] = self.cache.pages[block].clone()
            while len(self.blocks) > self.num_blocks:
                del self.blocks[next(iter(self.blocks))]

    def promote(self, pairs: Sequence[tuple[BlockKey, int]]) -> FakeTransfer:
        transfer = FakeTransfer(self, pairs)
        self.under_way.append(transfer)
        return transfer

    def poll(self) -> list[FakeTransfer]:
        for transfer in self.under_way:
            transfer.polls_left -= 1
            if transfer.polls_left < 0:
                transfer.finish()
        done = [transfer for transfer in self.under_way if transfer.done]
        self.under_way = [transfer for transfer in self.under_way if not transfer.done]
        return done

    def close(self) -> None:
        self.closed = True
