"""Logits of all four architectures against transformers, float32, from real checkpoint files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modelzoo import (
    ARCHITECTURES,
    BACKENDS,
    make_batch,
    relative_error,
    save_tiny_hf,
    scrambled_tables,
)
from torch import Tensor

from ch15_helpers import load_model
from ch15_helpers.model.transformer import Transformer

TOLERANCE = 1e-4
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "qwen3_moe-normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str
) -> tuple[Transformer, Any]:
    """Our model and transformers', from the same directory."""
    architecture, overrides = VARIANTS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    theirs = save_tiny_hf(architecture, path, **overrides)
    return load_model(path, device=device, dtype=torch.float32), theirs


def _expected(theirs: Any, token_ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = theirs(token_ids.cpu()).logits
    return logits


def test_dense_forward(pair: tuple[Transformer, Any], device: str) -> None:
    ours, theirs = pair
    token_ids = torch.randint(0, 160, (3, 90), generator=torch.Generator().manual_seed(1))
    expected = _expected(theirs, token_ids)
    logits = ours.forward_dense(token_ids.to(device))
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) < TOLERANCE
    assert torch.equal(logits.argmax(-1).cpu(), expected.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_forward(pair: tuple[Transformer, Any], backend: str, device: str) -> None:
    """Three sequences: chunked prefill at different speeds, then decodes, over scattered pages."""
    ours, theirs = pair
    lengths, chunks, block_size = (60, 37, 75), (16, 37, 29), 8
    generator = torch.Generator().manual_seed(2)
    token_ids = [torch.randint(0, 160, (n,), generator=generator) for n in lengths]
    expected = [_expected(theirs, ids[None])[0] for ids in token_ids]
    tables, num_blocks = scrambled_tables(lengths, block_size)
    config = ours.config
    pages = torch.full(
        (num_blocks, config.num_hidden_layers, 2, block_size, 2, config.head_dim), float("nan")
    ).to(device)
    done, steps, worst = [0, 0, 0], 0, 0.0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        active = [s for s in range(3) if done[s] < lengths[s]]
        # The last twelve tokens of each sequence are decoded one at a time.
        sizes = [min(chunks[s], max(1, lengths[s] - 12 - done[s])) for s in active]
        for s, size in zip(active, sizes, strict=True):
            done[s] += size
        contexts = [done[s] for s in active]
        batch, positions = make_batch(
            sizes, contexts, [tables[s] for s in active], block_size, device
        )
        flat = [token_ids[s][done[s] - n : done[s]] for s, n in zip(active, sizes, strict=True)]
        logits = ours.forward(
            torch.cat(flat).to(device), positions, pages, batch, attention_backend=backend
        )
        for row, s in enumerate(active):
            worst = max(worst, relative_error(logits[row], expected[s][done[s] - 1]))
        steps += 1
    assert steps > 14
    assert worst < TOLERANCE


def test_sharded_checkpoint_equals_single_file(tmp_path: Path) -> None:
    save_tiny_hf("llama", tmp_path / "single")
    save_tiny_hf("llama", tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single = dict(load_model(tmp_path / "single", "cpu").named_weights())
    sharded = dict(load_model(tmp_path / "sharded", "cpu").named_weights())
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_a_corrupted_block_changes_the_logits(tiny: Transformer, device: str) -> None:
    """Decode reads the cache: half of one earlier block's values negated must show."""
    tables, num_blocks = scrambled_tables([32], 8)
    pages = torch.zeros(num_blocks, 2, 2, 8, 2, 16, device=device)
    token_ids = torch.randint(0, 512, (32,), generator=torch.Generator().manual_seed(3)).to(device)
    batch, positions = make_batch([31], [31], tables, 8, device)
    tiny.forward(token_ids[:31], positions, pages, batch)
    batch, positions = make_batch([1], [32], tables, 8, device)
    good = tiny.forward(token_ids[31:], positions, pages, batch)
    pages[tables[0][1]] *= -1
    bad = tiny.forward(token_ids[31:], positions, pages, batch)
    assert relative_error(bad, good) > 0.05


def test_layers_are_callable_alone_and_report(tiny: Transformer, device: str) -> None:
    """Stepping through the layers by hand gives the same hidden states, and hooks fire in order."""
    from torch.nn.functional import embedding

    from ch15_helpers.kernels.rms_norm import rms_norm

    tables, num_blocks = scrambled_tables([20], 8)
    token_ids = torch.arange(20, device=device)
    batch, positions = make_batch([20], [20], tables, 8, device)
    pages = torch.zeros(num_blocks, 2, 2, 8, 2, 16, device=device)
    seen: list[tuple[int, bool, bool]] = []

    def on_layer_done(layer: int) -> None:
        written = [bool(pages[tables[0], i].any()) for i in (0, 1)]
        seen.append((layer, written[0], written[1]))

    whole = tiny.forward_hidden(token_ids, positions, pages, batch, on_layer_done=on_layer_done)
    assert seen == [(0, True, False), (1, True, True)]
    hidden, residual = embedding(token_ids, tiny.embed_tokens), None
    for index, layer in enumerate(tiny.layers):
        attend = tiny.paged_attend(index, torch.zeros_like(pages), batch)
        hidden, residual = layer(hidden, residual, positions, tiny.cos_sin_cache, attend)
    assert residual is not None
    last, _ = rms_norm(hidden, tiny.final_norm, tiny.config.rms_norm_eps, residual)
    assert torch.equal(last, whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_step_can_be_captured(dtype: torch.dtype) -> None:
    """A CUDA graph of a decode step, replayed on other tokens, equals the eager step."""
    model = load_model("random:TINY", "cuda", dtype)
    tables, num_blocks = scrambled_tables([40, 23, 9], 8)
    pages = torch.randn(num_blocks, 2, 2, 8, 2, 16, device="cuda", dtype=dtype)
    with_lengths, positions = make_batch([1, 1, 1], [40, 23, 9], tables, 8, "cuda")
    names = with_lengths.__dataclass_fields__
    fields = {name: getattr(with_lengths, name) for name in names}
    batch = type(with_lengths)(
        **fields | {"query_lens_host": (), "context_lens_host": (), "scratch": {}}
    )
    token_ids = torch.tensor([1, 2, 3], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.forward(token_ids, positions, pages, batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.forward(token_ids, positions, pages, batch)
    token_ids.copy_(torch.tensor([100, 200, 300], device="cuda"))
    graph.replay()
    replayed = captured.clone()
    assert torch.equal(replayed, model.forward(token_ids, positions, pages, batch))
    assert relative_error(replayed[0], replayed[1]) > 0.1
