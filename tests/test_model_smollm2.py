"""The real model: its weights and its greedy tokens are transformers', from the same file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from modelzoo import make_batch, scrambled_tables

from ch15_helpers import load_model
from ch15_helpers.model.config import SMOLLM2_135M
from ch15_helpers.model.loading import find_smollm2
from ch15_helpers.model.transformer import Transformer

# Chosen because the two best logits stay at least 0.05 apart over all 64 tokens, five hundred
# times the float32 noise between kernels; the test measures the margin again.
MIN_MARGIN = 0.02
PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4, 5, 6, 7,",
    "List the planets: Mercury, Venus, Earth,",
    "The alphabet is: a b c d e f",
    "The first ten prime numbers are",
    "def fibonacci(n):\n",
]
QUESTIONS = [
    "Explain gravity in one sentence.",
    "What is a KV cache?",
    "What is the capital of France?",
    "Name the days of the week.",
]
NUM_TOKENS = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other crawl when other workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoModelForCausalLM

    path = find_smollm2()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def _prompt_ids(model: Transformer) -> list[list[int]]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    return [tokenizer.encode(text) for text in PROMPTS + chats]


def _greedy(model: Transformer, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy decoding of all prompts together, over scattered pages."""
    lengths = [len(ids) for ids in prompts]
    block_size, config, device = 16, model.config, str(model.device)
    tables, num_blocks = scrambled_tables([n + num_tokens for n in lengths], block_size)
    shape = (config.num_hidden_layers, 2, block_size, config.num_key_value_heads, config.head_dim)
    pages = torch.zeros(num_blocks, *shape, dtype=model.dtype, device=device)
    batch, positions = make_batch(lengths, lengths, tables, block_size, device)
    flat = torch.tensor([token for ids in prompts for token in ids], device=device)
    tokens = model.forward(flat, positions, pages, batch).argmax(-1)
    outputs = [[int(token)] for token in tokens]
    for step in range(1, num_tokens):
        contexts = [n + step for n in lengths]
        batch, positions = make_batch([1] * len(prompts), contexts, tables, block_size, device)
        tokens = model.forward(tokens, positions, pages, batch).argmax(-1)
        for output, token in zip(outputs, tokens.tolist(), strict=True):
            output.append(token)
    return outputs


def test_weights_equal_bit_for_bit(smollm2: Transformer, theirs: Any) -> None:
    state = theirs.state_dict()
    ours = dict(smollm2.named_weights())
    assert set(state) - set(ours) <= {"lm_head.weight"}
    assert len(ours) == 272
    for name, weight in ours.items():
        expected = state[name].contiguous().view(torch.int32)
        assert torch.equal(weight.cpu().contiguous().view(torch.int32), expected), name


def test_configuration_equals_preset_and_transformers(smollm2: Transformer, theirs: Any) -> None:
    from ch15_helpers.model.config import ModelConfig

    assert smollm2.config == SMOLLM2_135M
    fields = theirs.config.to_dict()
    del fields["quantization_config"]  # says that the weights came out of a GGUF
    parsed = ModelConfig.from_hf(fields)
    for field in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta"):
        # transformers keeps epsilon as the float32 that the file stores.
        assert getattr(parsed, field) == pytest.approx(getattr(SMOLLM2_135M, field)), field
    assert SMOLLM2_135M.num_parameters() * 4 == smollm2.weight_bytes == 538_060_032
    assert SMOLLM2_135M.kv_bytes_per_token(2) == 2 * 30 * 3 * 64 * 2


@pytest.mark.timeout(180)
def test_same_64_greedy_tokens_as_transformers(smollm2: Transformer, theirs: Any) -> None:
    """``generate`` of transformers, left-padded, against our paged batch."""
    from transformers import GenerationConfig

    prompts = _prompt_ids(smollm2)
    width = max(len(ids) for ids in prompts)
    padded = torch.tensor([[2] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    # No end of sequence: all 64 tokens of every prompt are compared.
    settings = GenerationConfig(
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    theirs.generation_config.eos_token_id = None
    with torch.inference_mode():
        result = theirs.generate(padded, attention_mask=mask, generation_config=settings)
    best = torch.stack(result.logits).topk(2, dim=-1).values
    margin = float((best[..., 0] - best[..., 1]).min())
    expected = result.sequences[:, width:].tolist()
    outputs = _greedy(smollm2, prompts, NUM_TOKENS)
    for ids, ours, reference in zip(prompts, outputs, expected, strict=True):
        assert ours == reference, f"prompt {ids}: smallest margin of all prompts is {margin:.4f}"
    assert margin > MIN_MARGIN, f"smallest margin {margin:.4f}: choose sturdier prompts"


def test_alone_and_batched_give_the_same_tokens(smollm2: Transformer) -> None:
    prompts = _prompt_ids(smollm2)[:4]
    together = _greedy(smollm2, prompts, 16)
    assert [_greedy(smollm2, [ids], 16)[0] for ids in prompts] == together
    assert len({tuple(output) for output in together}) == 4


def test_answers(smollm2: Transformer) -> None:
    assert smollm2.tokenizer is not None
    outputs = _greedy(smollm2, _prompt_ids(smollm2), 8)
    assert smollm2.tokenizer.decode(outputs[0]).startswith(" Paris.")
    assert smollm2.tokenizer.decode(outputs[8]) == "The capital of France is Paris."


def test_loads_within_budget() -> None:
    """Four seconds of processor time is the promise; it takes about one."""
    start = time.process_time()
    load_model("smollm2", "cpu")
    assert time.process_time() - start < 4.0
