"""Records of the comparison with production systems are read, compared and written as they are."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ch15_helpers.bench import (
    engine,
    kernels,
    moe,
    production,
    production_peers,
    products,
    records,
)
from ch15_helpers.bench.production import LIBRARY, OURS, compare, limits_table, table
from ch15_helpers.bench.records import Row, fastest_peer, load, parse
from ch15_helpers.errors import Ch15Error, HardwareError
from ch15_helpers.hardware import Ceilings, HardwareProfile
from ch15_helpers.model.config import LLAMA3_8B, TINY_MOE


def profile() -> HardwareProfile:
    ceilings = Ceilings(10.0, 10.0, {"float32": 0.1, "bfloat16": 0.1}, 1.0, None)
    return HardwareProfile("h200", "test", "cpu", None, torch.__version__, None, 1, 1, ceilings)


def test_ratios_are_speeds_whichever_way_the_unit_points() -> None:
    ours = [
        Row("engine", "many", "tok/s", OURS, 6600.0, 7700.0),
        Row("engine", "one", "ms/token", OURS, 4.0, 3.5),
    ]
    peers = [
        Row("engine", "many", "tok/s", "slow", 500.0),
        Row("engine", "many", "tok/s", "fast", 6000.0),
        Row("engine", "one", "ms/token", "fast", 5.0),
        Row("attention", "many", "tok/s", "another group", 9000.0),
    ]
    many, one = compare(ours, peers, "engine")
    assert (many.peers[0].system, many.ratio) == ("fast", pytest.approx(1.1))
    assert one.ratio == pytest.approx(1.25)
    assert many.ours.fraction == pytest.approx(6600 / 7700)
    assert one.ours.fraction == pytest.approx(3.5 / 4.0)
    assert "| one | ms/token | 4 | 3.5 | 88% | fast | 5 | 1.25× |" in table([one])


def test_a_layers_products_stand_beside_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(production, "PRODUCTS_MODEL", "TINY")
    monkeypatch.setattr(production, "PRODUCTS_TOKENS", 16)
    rows = production.product_rows(profile())
    found = compare(rows, [], "products under load")
    assert [c.ours.work for c in found] == [
        records.product_work(name) for name in products.layer_products(LLAMA3_8B)
    ]
    assert all([peer.system for peer in c.peers] == [LIBRARY] and c.ratio > 0 for c in found)
    assert compare(rows, [], "engine") == []


@pytest.mark.parametrize("name", ["peers_h200", "ours_h200"])
def test_every_recorded_work_is_one_that_we_measure(name: str) -> None:
    record = load(name)
    assert record is not None
    works = {records.attention_work(shape) for shape in records.ATTENTION}
    works |= {records.expert_work(*block) for block in records.EXPERTS}
    works |= set(records.ENGINE)
    loaded = {records.product_work(part) for part in products.layer_products(LLAMA3_8B)}
    assert {row.work for row in record.rows} == works | (loaded if name == "ours_h200" else set())
    assert all(row.value > 0 for row in record.rows)
    again = parse(json.dumps(record.to_json()), name)
    assert again == record


def test_our_record_is_beside_its_limits() -> None:
    record = load("ours_h200")
    assert record is not None
    limited = [row for row in record.rows if row.group != "products under load"]
    assert all(row.fraction is not None and 0 < row.fraction < 1.05 for row in limited)
    lines = limits_table(record.rows, "experts under load").splitlines()[2:]
    assert len(lines) == sum(tokens >= records.FILLS_CHIP for _, tokens in records.EXPERTS)
    assert all(line.endswith("% |") for line in lines)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(schema_version=9), "schema_version"),
        (lambda d: d["rows"][0].update(group="magic"), "unknown groups"),
        (lambda d: d["rows"][0].pop("value"), "value"),
        (lambda d: d.pop("rows"), "rows"),
    ],
)
def test_a_malformed_record_says_what_is_wrong(
    change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    record = load("peers_h200")
    assert record is not None
    data = record.to_json()
    change(data)
    with pytest.raises(Ch15Error, match=complaint):
        parse(json.dumps(data), "peers_h200")


def test_names_of_works_are_shapes_of_the_benchmarks() -> None:
    shapes = {case.name for case in kernels.gpu_cases() if case.kernel == "decode"}
    assert set(records.ATTENTION) <= shapes
    assert {model for model, _ in records.EXPERTS} <= set(moe.MODELS)
    _, loads = production.peer_loads()
    assert tuple(given.name for given in loads) == records.ENGINE


def test_without_a_gpu_nothing_is_measured() -> None:
    for main in (production.main, production_peers.main):
        with pytest.raises(HardwareError, match="GPU"):
            main(out=Path("nowhere"), device="cpu")  # type: ignore[operator]


def test_peers_that_are_not_installed_are_named() -> None:
    rows, left_out = production_peers.measure_peers(profile())
    assert rows == []
    assert [text.split(":")[0] for text in left_out] == list(production_peers.PEERS)
    assert all("not installed" in text for text in left_out)


class Wrapper:
    """FlashInfer's wrapper, as far as we use it: checks the page table that it is given."""

    def __init__(self, workspace: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert (layout, use_tensor_cores) == ("NHD", True)

    def plan(self, indptr: Any, indices: Any, last: Any, *shape: int, **types: Any) -> None:
        assert indptr.tolist() == [0, 3, 4]
        assert sorted(indices.tolist()) == [0, 1, 2, 3]
        assert last.tolist() == [8, 7]
        assert shape == (4, 2, 16, 16)

    def run(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        assert pages.shape == (4, 2, 16, 2, 16)
        return q + pages.sum().to(q.dtype)


class LLM:
    """vLLM's offline engine, as far as we use it."""

    def __init__(self, model: str, **settings: Any) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        assert config["hidden_size"] == 4096
        assert settings["load_format"] == "dummy"
        assert settings["enable_prefix_caching"] is False

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> Any:
        made = SimpleNamespace(token_ids=[0] * params.max_tokens)
        return [SimpleNamespace(outputs=[made]) for _ in prompts]


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Any) -> None:
    module = ModuleType(name)
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, name, module)


def test_peers_that_are_installed_get_our_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = kernels.Case("decode", "tiny", (1, 1), (40, 7), heads=4, kv_heads=2, head_dim=16)
    monkeypatch.setattr(kernels, "gpu_cases", lambda: [small])
    monkeypatch.setattr(records, "ATTENTION", ("tiny",))
    monkeypatch.setattr(records, "EXPERTS", (("MIXTRAL_8X7B", 4),))
    monkeypatch.setattr(moe, "MODELS", {"MIXTRAL_8X7B": TINY_MOE})
    load_ = engine.Load("1 request", (5,), (3,), "ms/token")
    monkeypatch.setattr(production, "peer_loads", lambda: (None, (load_,)))
    monkeypatch.setattr(production_peers, "version", lambda package: "9.9")
    seen = []

    def fused_experts(x: Any, gate_up: Any, down: Any, weights: Any, ids: Any) -> Any:
        seen.append((x.shape[0], gate_up.shape[0], ids.dtype))
        return x

    fake_module(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    fake_module(monkeypatch, "vllm", LLM=LLM, SamplingParams=SimpleNamespace)
    fake_module(
        monkeypatch, "vllm.config", VllmConfig=dict, set_current_vllm_config=contextlib.nullcontext
    )
    fake_module(monkeypatch, "vllm.model_executor.layers.fused_moe", fused_experts=fused_experts)
    rows, left_out = production_peers.measure_peers(profile())
    assert left_out == []
    assert [(row.group, row.work) for row in rows] == [
        ("attention", "decode tiny"),
        ("experts", "Mixtral-8x7B, 4 tokens"),
        ("engine", "1 request"),
    ]
    assert rows[2].system == "vLLM 9.9"
    assert set(seen) == {(4, TINY_MOE.num_experts, torch.int32)}


def test_a_peer_that_breaks_costs_only_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_version(_: HardwareProfile) -> list[Row]:
        raise TypeError("plan() got an unexpected argument")

    kept = Row("engine", "1 request", "ms/token", "vLLM", 5.0)
    peers = {"a": other_version, "b": lambda _: [kept]}
    monkeypatch.setattr(production_peers, "PEERS", peers)
    rows, left_out = production_peers.measure_peers(profile())
    assert rows == [kept]
    assert left_out == ["a: did not run (TypeError: plan() got an unexpected argument)"]


def test_the_fastest_peer_of_a_work() -> None:
    assert fastest_peer("attention", "decode 64 x 4096", "h200") == 4.12
    assert fastest_peer("engine", "1 request", "h200") == 5.02  # not transformers' 7.2 ms
    assert fastest_peer("engine", "1 request", "cpu") is None
    assert fastest_peer("engine", "no such work", "h200") is None
