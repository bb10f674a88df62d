"""Which layout and dtype a model's weights get on the CPU: by a fixed rule, or by measurement.

The rule (``layout=None``) depends on the dtype and the machine alone, so that every process of
a run rounds alike: float32 gets ``compiled`` where our kernels can be compiled, bfloat16 gets
``tiles`` where the processor has matrix tiles, else ``onednn`` where oneDNN takes it; all else
keeps ``rows``. (SmolLM2 on two cores, a whole decode step, ``onednn`` against ``tiles``: 1 token
21.5 ms, 10.6; 16 tokens 30.0, 16.4; 32 tokens 39.7, 24.9.) A measurement (``layout="fastest"``, or
``dtype="fastest"`` of :func:`.load_model`) times each candidate on this machine; two runs may
choose differently, and then their float32 logits differ in the last bits. With matrix tiles it
finds ``grid`` for float32 (``compiled`` against ``grid``: 19.3 ms, 6.1; 35.4, 17.3; 52.4, 28.2); a
weight that is on no grid then gets ``compiled``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.errors import ModelLoadError
from ch15_helpers.kernels.cpu_memory import empty_in_huge_pages
from ch15_helpers.kernels.linear_cpu import (
    LAYOUTS,
    is_compiled,
    layouts_of,
    linear_cpu,
    onednn_has_bfloat16,
    pack_weight,
)
from ch15_helpers.model.dense_mlp import DenseMLP
from ch15_helpers.model.transformer import Transformer

FASTEST = "fastest"
# The first of these that there is. ``grid`` is quicker than any, but it multiplies other bits than
# ``compiled``, which gives the same ones on every processor with a fused multiply-add, and it reads
# fewer bytes than a float32 model has: it is for those who ask for what is fastest.
_RULE = ("compiled", "tiles", "onednn")
# Tokens in a step: a lone request, a few, a batch.
_TOKENS = (1, 4, 16)
# SmolLM2's widest matrix, in more copies than a core's own cache holds.
_SHAPE, _COPIES, _ROUNDS = (3072, 576), 4, 4


@dataclass(frozen=True)
class LayoutTiming:
    """What one layout took: ``seconds[n]`` for a product of ``n`` tokens with one weight."""

    dtype: torch.dtype
    layout: str
    seconds: dict[int, float]

    @property
    def mean_s(self) -> float:
        """Geometric mean over the numbers of tokens: each of them counts the same."""
        return math.exp(sum(map(math.log, self.seconds.values())) / len(self.seconds))


def measure_layouts(dtypes: Iterable[torch.dtype]) -> list[LayoutTiming]:
    """Times each layout that the dtypes have here, fastest first; about 0.2 s in all."""
    candidates = {
        (dtype, layout): [pack_weight(torch.full(_SHAPE, 0.01, dtype=dtype), layout)]
        for dtype in dtypes
        for layout in layouts_of(dtype)
    }
    for weights in candidates.values():
        weights.extend(weights[0].clone() for _ in range(_COPIES - 1))
    best: dict[tuple[torch.dtype, str], dict[int, float]] = {key: {} for key in candidates}
    with torch.inference_mode():
        for tokens in _TOKENS * _ROUNDS:
            # Interleaved, and the best of the rounds: another process may hold the cores.
            for key, weights in candidates.items():
                x = torch.full((tokens, _SHAPE[1]), 0.5, dtype=key[0])
                start = time.perf_counter()
                for weight in weights:
                    linear_cpu(x, weight)
                seconds = (time.perf_counter() - start) / len(weights)
                best[key][tokens] = min(seconds, best[key].get(tokens, seconds))
    timings = [LayoutTiming(*key, seconds) for key, seconds in best.items()]
    return sorted(timings, key=lambda timing: timing.mean_s)


def fastest_dtype() -> torch.dtype:
    """float32, or bfloat16 where its weights were measured to be faster on this machine."""
    if not onednn_has_bfloat16():
        return torch.float32
    return measure_layouts((torch.float32, torch.bfloat16))[0].dtype


def choose_layout(dtype: torch.dtype, layout: str | None = None) -> str:
    """Turns None (the rule) or ``"fastest"`` (a measurement) into a layout, or checks a given one.

    Raises:
        ModelLoadError: an unknown layout, or one that this dtype or machine does not have.
    """
    available = layouts_of(dtype)
    if layout is None:
        return next((name for name in _RULE if name in available), "rows")
    if layout == FASTEST:
        return measure_layouts((dtype,))[0].layout
    if layout not in LAYOUTS:
        raise ModelLoadError(
            f"unknown weight layout {layout!r}; expected one of {', '.join((*LAYOUTS, FASTEST))}"
        )
    if layout not in available:
        raise ModelLoadError(
            f"weights of {dtype} have no layout {layout!r} on this machine; "
            f"expected one of {', '.join((*available, FASTEST))}"
        )
    return layout


def pack_weights(model: Transformer, layout: str) -> None:
    """Puts the dense matrices of a model on the CPU into a layout, one after the other.

    Each replaces its original, so no more than one matrix is held twice; a tied embedding stays
    as it is, for lookups, beside its packed copy that makes the logits. Experts stay as they are.

    Args:
        model: with weights in ``rows``.
        layout: from :func:`choose_layout`.
    """
    if layout == "rows":
        return
    place = _Places(model) if layout in ("compiled", "grid", "tiles") else _as_it_is
    for layer in model.layers:
        layer.qkv_proj = place(pack_weight(layer.qkv_proj, layout))
        layer.o_proj = place(pack_weight(layer.o_proj, layout))
        if isinstance(layer.mlp, DenseMLP):
            layer.mlp.gate_up_proj = place(pack_weight(layer.mlp.gate_up_proj, layout))
            layer.mlp.down_proj = place(pack_weight(layer.mlp.down_proj, layout))
    model.lm_head = place(pack_weight(model.lm_head, layout))
    off_grid = layout == "grid" and model.lm_head.dtype != torch.uint8
    model.weight_layout = "compiled" if off_grid else layout


def _as_it_is(packed: Tensor) -> Tensor:
    return packed


class _Places:
    """Puts packed weights side by side into one run of huge pages, in the order of their use."""

    def __init__(self, model: Transformer) -> None:
        weights = [model.lm_head]
        for layer in model.layers:
            weights += [layer.qkv_proj, layer.o_proj]
            if isinstance(layer.mlp, DenseMLP):
                weights += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
        self._free = empty_in_huge_pages(sum(w.nbytes for w in weights), torch.uint8)

    def __call__(self, packed: Tensor) -> Tensor:
        if not is_compiled(packed):
            return packed
        place, self._free = self._free.tensor_split([packed.nbytes])
        return place.view(packed.dtype).view(packed.shape).copy_(packed)
