"""Loads a Hugging Face directory: config.json, safetensors (one file or shards), tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.model.transformer import Transformer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def load_hf_directory(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Loads config.json, every tensor of the safetensors files, and tokenizer.json if present.

    Raises:
        ModelLoadError: anything missing, left over, truncated or of the wrong shape.
    """
    raw = read_json(path / "config.json")
    try:
        config = ModelConfig.from_hf(raw)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path / 'config.json'}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"{path / 'config.json'}: malformed field: {error}") from error
    files = _tensor_files(path)
    model = Transformer(config, device, dtype)
    _copy_tensors(model, files, path)
    if (path / "tokenizer.json").is_file():
        from ch15_helpers.model.tokenizer import Tokenizer

        model.tokenizer = Tokenizer.from_hf_dir(path)
    return model


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelLoadError: no such file, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path}: no such file; a model directory needs config.json and safetensors files"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _tensor_files(path: Path) -> dict[str, Path]:
    """Which file each tensor is in, after checking that every file is whole."""
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelLoadError(f"{index}: has no object 'weight_map'; download it again")
        files = {name: path / str(file) for name, file in weight_map.items()}
        found = {file: set(_read_header(file)) for file in set(files.values())}
        for name, file in files.items():
            if name not in found[file]:
                raise ModelLoadError(
                    f"{file}: has no tensor {name!r}, which {INDEX_FILE} says it holds"
                )
        return files
    single = path / SINGLE_FILE
    if not single.is_file():
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        hint = f" (found {', '.join(pickled)}: pickled weights are never read)" if pickled else ""
        raise ModelLoadError(
            f"{path}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}; "
            "save the model with safetensors"
        )
    return dict.fromkeys(_read_header(single), single)


def _read_header(file: Path) -> Mapping[str, Any]:
    """Tensor table of a safetensors file: 8 bytes of length, JSON, then the data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or 8 + length > size:
                raise ModelLoadError(
                    f"{file}: truncated or not safetensors: its header should have {length} bytes, "
                    f"the file has {size}; download it again"
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            end = 8 + length + int(entry["data_offsets"][1])
            if end > size:
                raise ModelLoadError(
                    f"{file}: truncated: tensor {name!r} ends at byte {end}, the file has {size}; "
                    "download it again"
                )
    except FileNotFoundError as error:
        raise ModelLoadError(f"{file}: no such file, but {INDEX_FILE} names it") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelLoadError(
            f"{file}: corrupted safetensors header ({error}); download it again"
        ) from error
    return dict(header)


def _copy_tensors(model: Transformer, files: Mapping[str, Path], path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    wanted = dict(model.named_weights())
    check_names(wanted, files, str(path))
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for name in names:
                    copy_checked(wanted[name], handle.get_tensor(name), name, file)
        except SafetensorError as error:
            raise ModelLoadError(f"{file}: cannot be read ({error}); download it again") from error


def check_names(wanted: Mapping[str, Any], present: Mapping[str, Any], where: str) -> None:
    """Every wanted tensor must be there, and nothing else that would change the result.

    Raises:
        ModelLoadError: names the file or directory and the first such tensor.
    """
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ModelLoadError(
            f"{where}: missing tensor {missing[0]!r} ({len(missing)} missing of {len(wanted)}); "
            "the checkpoint is incomplete or its config.json belongs to another model"
        )
    # A tied head may be stored again, and old files store the rotary frequencies.
    ignorable = ("lm_head.weight", "rotary_emb.inv_freq", "output.weight")
    extra = [n for n in present if n not in wanted and not n.endswith(ignorable)]
    if extra:
        raise ModelLoadError(
            f"{where}: unexpected tensor {extra[0]!r} ({len(extra)} in all), which this "
            "architecture does not use; its config.json belongs to another model"
        )


def copy_checked(target: torch.Tensor, value: torch.Tensor, name: str, file: Path) -> None:
    """Copies a tensor into its place.

    Raises:
        ModelLoadError: the shape is not the one that the configuration asks for.
    """
    if value.shape != target.shape:
        raise ModelLoadError(
            f"{file}: tensor {name!r} has shape {list(value.shape)}, expected "
            f"{list(target.shape)} from the configuration"
        )
    if not value.is_floating_point():
        raise ModelLoadError(
            f"{file}: tensor {name!r} is {value.dtype}, expected a floating-point type"
        )
    target.copy_(value)
