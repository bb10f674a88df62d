"""A model whose next token is a hash of everything that it reads from the KV cache.

It writes token and position where the batch says, reads every context back through the block
table, and fails loudly when a position is not where it should be. Any block that was lost, mixed
up, overwritten or not copied therefore changes the tokens, and the right tokens are known without
any model: ``expected_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
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
