"""Engine, harness and widgets of the executable book on LLM inference and KV-cache management.

The names below are loaded on first use, so that ``import ch15_helpers`` stays cheap and the
command line can answer without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ch15_helpers.errors import CapacityError, Ch15Error, InvalidRequestError, ModelLoadError
    from ch15_helpers.model.config import ModelConfig
    from ch15_helpers.model.loading import load_model
    from ch15_helpers.serving.config import EngineConfig
    from ch15_helpers.serving.engine import Engine
    from ch15_helpers.serving.metrics import goodput, summarise
    from ch15_helpers.serving.request import SLO, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "SLO",
    "CapacityError",
    "Ch15Error",
    "Engine",
    "EngineConfig",
    "InvalidRequestError",
    "ModelConfig",
    "ModelLoadError",
    "RequestOutput",
    "SamplingParams",
    "goodput",
    "load_model",
    "summarise",
]


def _home(name: str) -> str:
    """Module that defines a public name."""
    return {
        "CapacityError": "errors",
        "Ch15Error": "errors",
        "InvalidRequestError": "errors",
        "ModelLoadError": "errors",
        "ModelConfig": "model.config",
        "load_model": "model.loading",
        "EngineConfig": "serving.config",
        "Engine": "serving.engine",
        "SLO": "serving.request",
        "goodput": "serving.metrics",
        "summarise": "serving.metrics",
        "RequestOutput": "serving.request",
        "SamplingParams": "serving.request",
    }[name]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_home(name)}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
