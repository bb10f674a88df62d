"""Layouts of weights on the CPU: same products, same tokens, no second copy, clear errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from modelzoo import make_batch, relative_error, scrambled_tables

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.errors import ModelLoadError
from ch15_helpers.kernels.linear import linear
from ch15_helpers.kernels.linear_cpu import (
    layouts_of,
    onednn_has_bfloat16,
    pack_weight,
    unpack_weight,
)
from ch15_helpers.model import cpu_weights
from ch15_helpers.model.cpu_weights import LayoutTiming, choose_layout, measure_layouts

needs_panels = pytest.mark.skipif(
    "panels" not in layouts_of(torch.float32), reason="this torch has no MKL"
)
needs_bfloat16 = pytest.mark.skipif(
    not onednn_has_bfloat16(), reason="oneDNN has no bfloat16 on this processor"
)
TINY_MODELS = ("random:TINY", "random:TINY_MOE")


@needs_panels
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 16, 49, 130])
@pytest.mark.parametrize("features", [(96, 576), (80, 49), (64, 48), (50, 30)])
@pytest.mark.parametrize("bias", [True, False])
def test_panels_against_float64(rows: int, features: tuple[int, int], bias: bool) -> None:
    """50 output features fit no panel: that weight stays as it is, and still multiplies."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features[1], generator=generator)
    weight = torch.randn(features, generator=generator)
    offset = torch.randn(features[0], generator=generator) if bias else None
    packed = pack_weight(weight, "panels")
    assert (packed is weight) == (features[0] == 50)
    assert torch.equal(unpack_weight(packed), weight)
    out = linear(x, packed, offset)
    expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert out.shape == expected.shape and out.is_contiguous()
    assert rows == 0 or relative_error(out, expected) < 2e-6


@needs_bfloat16
@pytest.mark.parametrize("rows", [0, 1, 4, 33])
def test_onednn_gives_the_bits_of_rows(rows: int) -> None:
    x, weight = torch.randn(rows, 576).bfloat16(), torch.randn(960, 576).bfloat16()
    packed = pack_weight(weight, "onednn")
    assert packed.is_mkldnn and torch.equal(unpack_weight(packed), weight)
    offset = torch.randn(960).bfloat16()
    for bias in (None, offset):
        expected = torch.nn.functional.linear(x, weight, bias)
        out = linear(x, packed, bias)
        assert out.shape == expected.shape
        assert rows == 0 or relative_error(out, expected) < 4e-3
    assert torch.equal(linear(x, packed), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("source", TINY_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_logits_and_weights_in_every_layout(source: str, dtype: torch.dtype) -> None:
    plain = load_model(source, "cpu", dtype, cpu_layout="rows")
    tables, num_blocks = scrambled_tables([5, 9], 4)
    batch, positions = make_batch([5, 1], [5, 9], tables, 4)
    config = plain.config
    shape = (
        num_blocks,
        config.num_hidden_layers,
        2,
        4,
        config.num_key_value_heads,
        config.head_dim,
    )
    for layout in layouts_of(dtype)[1:]:
        packed = load_model(source, "cpu", dtype, cpu_layout=layout)
        got = "compiled" if layout == "grid" else layout  # random weights are on no grid
        assert (plain.weight_layout, packed.weight_layout) == ("rows", got)
        assert packed.lm_head is not packed.embed_tokens
        assert packed.weight_bytes == plain.weight_bytes
        for (name, ours), (_, theirs) in zip(
            packed.named_weights(), plain.named_weights(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        logits = [
            model(torch.arange(6), positions, torch.zeros(shape, dtype=dtype), batch)
            for model in (plain, packed)
        ]
        assert relative_error(logits[1], logits[0]) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("layout", layouts_of(torch.float32)[1:])
def test_same_tokens_from_the_engine(layout: str) -> None:
    prompts = [[1, 2, 3], [4, 5], list(range(6, 20)), [7], [8, 9]]
    outputs = [
        Engine(
            load_model("random:TINY", "cpu", cpu_layout=choice),
            EngineConfig(block_size=4, num_blocks=64),
        ).generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
        for choice in ("rows", layout)
    ]
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]


def test_a_changed_packed_weight_changes_the_product() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for layout in layouts_of(dtype)[1:]:
            x, weight = torch.randn(5, 64).to(dtype), torch.randn(96, 64).to(dtype)
            before = linear(x, pack_weight(weight, layout))
            weight[17] += 1.0
            changed = (linear(x, pack_weight(weight, layout)) != before).any(0).nonzero()
            assert changed.flatten().tolist() == [17]


def test_the_rule_depends_on_dtype_and_processor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = "compiled" in layouts_of(torch.float32)
    assert choose_layout(torch.float32) == ("compiled" if compiled else "rows")
    assert choose_layout(torch.float16) == "rows"
    best = "tiles" if "tiles" in layouts_of(torch.bfloat16) else layouts_of(torch.bfloat16)[-1]
    assert choose_layout(torch.bfloat16) == best
    monkeypatch.setattr(cpu_weights, "layouts_of", lambda dtype: ("rows",))
    monkeypatch.setattr(cpu_weights, "onednn_has_bfloat16", lambda: False)
    assert choose_layout(torch.bfloat16) == "rows"
    assert cpu_weights.fastest_dtype() == torch.float32
    assert load_model("random:TINY", "cpu", torch.bfloat16).weight_layout == "rows"


def test_fastest_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "rows": 4.0,
        "panels": 3.0,
        "compiled": 2.0,
        "grid": 1.5,
        "onednn": 1.0,
        "tiles": 0.5,
    }

    def fake(dtypes: tuple[torch.dtype, ...]) -> list[LayoutTiming]:
        found = [
            LayoutTiming(dtype, layout, {1: seconds[layout], 16: seconds[layout]})
            for dtype in dtypes
            for layout in layouts_of(dtype)
        ]
        return sorted(found, key=lambda timing: timing.mean_s)

    monkeypatch.setattr(cpu_weights, "measure_layouts", fake)
    best = layouts_of(torch.float32)[-1]
    assert load_model("random:TINY", "cpu", cpu_layout="fastest").weight_layout == (
        "compiled" if best == "grid" else best  # random weights are on no grid
    )
    expected = torch.bfloat16 if onednn_has_bfloat16() else torch.float32
    assert load_model("random:TINY", "cpu", "fastest").dtype == expected


def test_measurement_covers_every_layout() -> None:
    timings = measure_layouts((torch.float32, torch.bfloat16))
    assert {(t.dtype, t.layout) for t in timings} == set(
        itertools.chain.from_iterable(
            ((dtype, layout) for layout in layouts_of(dtype))
            for dtype in (torch.float32, torch.bfloat16)
        )
    )
    assert all(t.seconds.keys() == {1, 4, 16} and min(t.seconds.values()) > 0 for t in timings)
    assert [t.mean_s for t in timings] == sorted(t.mean_s for t in timings)
    assert LayoutTiming(torch.float32, "rows", {1: 1.0, 4: 4.0}).mean_s == pytest.approx(
        math.sqrt(4.0)
    )


@pytest.mark.parametrize(
    ("dtype", "layout", "message"),
    [
        (torch.float32, "columns", "unknown weight layout 'columns'"),
        (torch.float16, "panels", "have no layout 'panels'"),
        (torch.float32, "onednn", "have no layout 'onednn'"),
    ],
)
def test_wrong_layouts(dtype: torch.dtype, layout: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model("random:TINY", "cpu", dtype, cpu_layout=layout)
