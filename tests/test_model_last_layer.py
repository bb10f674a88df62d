"""The last layer computes what is sampled, and of everything else no more than keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.linear_cpu import unpack_weight

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer


def counted(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that go through the last layer's feed-forward block."""
    rows: list[int] = []
    block = model.layers[-1].mlp

    def count(x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return block(x)

    monkeypatch.setattr(model.layers[-1], "mlp", count)
    return rows


def test_prompts_leave_the_last_layer_early(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(num_blocks=64, max_num_batched_tokens=16, async_scheduling=False)
    prompt, params = list(range(1, 41)), SamplingParams(max_tokens=3, ignore_eos=True)
    whole = tiny.forward_dense(torch.tensor([prompt], device=tiny.device))[0, -1]
    rows = counted(tiny, monkeypatch)
    (output,) = Engine(tiny, config).generate([prompt], params)
    assert rows[-5:] == [0, 0, 1, 1, 1]  # two chunks without a sample, one with, two decodes
    assert output.token_ids[0] == int(whole.argmax())


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_logits_are_those_of_all_rows(name: str, request: pytest.FixtureRequest) -> None:
    model: Transformer = request.getfixturevalue(name)
    config, count = model.config, 12
    tokens = torch.arange(3, 3 + count, device=model.device)
    shape = (2, config.num_hidden_layers, 2, 16, config.num_key_value_heads, config.head_dim)

    def logits(rows: list[int]) -> torch.Tensor:
        batch = BatchMetadata(
            query_starts=torch.tensor([0, count], dtype=torch.int32, device=model.device),
            context_lens=torch.tensor([count], dtype=torch.int32, device=model.device),
            block_tables=torch.tensor([[1]], dtype=torch.int32, device=model.device),
            slot_mapping=torch.arange(16, 16 + count, device=model.device),
            logits_indices=torch.tensor(rows, dtype=torch.int64, device=model.device),
            max_query_len=count,
            max_context_len=count,
            query_lens_host=(count,),
            context_lens_host=(count,),
        )
        positions = torch.arange(count, device=model.device)
        pages = torch.zeros(shape, device=model.device)
        return model.forward(tokens, positions, pages, batch)

    every = logits(list(range(count)))
    assert torch.allclose(logits([11, 4]), every[[11, 4]], atol=1e-5)
    assert logits([]).shape == (0, config.vocab_size)


def test_narrow_logits_are_the_wide_ones_before_they_were_widened(tiny: Transformer) -> None:
    hidden = torch.randn(3, tiny.config.hidden_size, device=tiny.device)
    model = type(tiny)(tiny.config, tiny.device, torch.bfloat16)
    model.lm_head.copy_(unpack_weight(tiny.lm_head))
    narrow = model.compute_logits(hidden.bfloat16(), wide=False)
    wide = model.compute_logits(hidden.bfloat16())
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow.float(), wide)
