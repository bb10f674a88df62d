"""Rows of the kernel benchmark that are not attention, and how a kernel is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from ch15_helpers.bench.timing import measure
from ch15_helpers.hardware import HardwareProfile
from ch15_helpers.kernels.block_copy import gather_blocks, scatter_blocks
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import build_cos_sin_cache
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv
from ch15_helpers.kernels.sampling import sample_tokens
from ch15_helpers.kernels.swiglu import swiglu

LAYERS = 2  # Calls take turns, so that no call finds its pages in the cache of the one before.
Run = Callable[[int], object]


@dataclass(frozen=True)
class KernelRow:
    """``achieved``, ``limit`` and ``peer`` in ``unit``; ``time_s`` of one call."""

    kernel: str
    shape: str
    unit: str
    time_s: float
    achieved: float
    limit: float
    peer: float | None = None

    @property
    def fraction(self) -> float:
        return self.achieved / self.limit

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.achieved / self.peer


def time_s(call: Run, device: torch.device, calls: int = 4, min_s: float = 0.03) -> float:
    """Median seconds of a call: on a GPU of replayed graphs of ``calls``, clocks warmed up."""
    if device.type != "cuda":
        return measure(lambda: call(0), device=device, iterations=10).median_s
    for turn in range(LAYERS):
        call(turn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            call(turn)
    once_s = measure(graph.replay, device=device, iterations=2, warmup=1).median_s
    replays = max(4, math.ceil(min_s / once_s))
    for _ in range(replays // 2):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    return float(median(a.elapsed_time(b) for a, b in pairwise(events))) / 1e3 / calls


@torch.inference_mode()
def block_rows(profile: HardwareProfile, dtype: torch.dtype) -> list[KernelRow]:
    """Gathers and scatters half of a pool's blocks, both layouts; bytes read and written."""
    device, rows = torch.device(profile.device), []
    blocks, layers = (512, 32) if device.type == "cuda" else (64, 8)
    for layout in ("block-major", "layer-major"):
        tail = (16, 8, 128)
        major = layout == "block-major"
        shape = (blocks, layers, 2, *tail) if major else (layers, 2, blocks, *tail)
        pages = torch.randn(shape, device=device, dtype=dtype)
        pages = pages if major else pages.permute(2, 0, 1, 3, 4, 5)
        ids = torch.randperm(blocks)[: blocks // 2].to(device)
        data = gather_blocks(pages, ids)
        calls: dict[str, Run] = {
            "gather": lambda _, p=pages, i=ids, d=data: gather_blocks(p, i, d),  # type: ignore[misc]
            "scatter": lambda _, p=pages, i=ids, d=data: scatter_blocks(p, i, d),  # type: ignore[misc]
        }
        for name, call in calls.items():
            elapsed_s = time_s(call, device)
            rate, limit = 2 * data.nbytes / elapsed_s / 1e12, profile.ceilings.copy_GBps / 1e3
            shape_name = f"{len(ids)} blocks, {layout}"
            rows.append(KernelRow(f"{name} blocks", shape_name, "TB/s", elapsed_s, rate, limit))
    return rows


@torch.inference_mode()
def pointwise_rows(profile: HardwareProfile, dtype: torch.dtype) -> list[KernelRow]:
    """Norm with residual, rotation with KV write, and SwiGLU of one large prefill step.

    Llama-3-8B's sizes. Bytes are what must be read and written once.
    """
    device = torch.device(profile.device)
    tokens = 8192 if device.type == "cuda" else 256
    hidden, inner, heads, kv_heads, head_dim, page = 4096, 14336, 32, 8, 128, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, residual, weight, gate_up = (
        normal(tokens, hidden), normal(tokens, hidden), normal(hidden), normal(tokens, 2 * inner)
    )  # fmt: skip
    qkv = normal(tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
    pages = normal(tokens // page, LAYERS, 2, page, kv_heads, head_dim)
    positions = torch.arange(tokens, device=device)
    slots = torch.randperm(tokens).to(device)
    table = build_cos_sin_cache(head_dim, tokens, 5e5, device=device)

    def rotate_and_write(turn: int) -> torch.Tensor:
        kv = pages[:, turn % LAYERS, 0], pages[:, turn % LAYERS, 1]
        return rope_and_write_kv(q, k, v, *kv, table, positions, slots)

    calls: dict[str, tuple[Run, int]] = {
        "rms_norm": (lambda _: rms_norm(x, weight, 1e-5, residual), 4 * x.nbytes),
        "rope_and_write_kv": (rotate_and_write, 2 * qkv.nbytes + tokens * head_dim * 4),
        "swiglu": (lambda _: swiglu(gate_up), gate_up.nbytes * 3 // 2),
    }
    rows, limit = [], profile.ceilings.copy_GBps / 1e3
    for name, (call, moved) in calls.items():
        elapsed_s = time_s(call, device)
        rate = moved / elapsed_s / 1e12
        rows.append(KernelRow(name, f"{tokens} tokens", "TB/s", elapsed_s, rate, limit))
    return rows


@torch.inference_mode()
def sampling_rows(profile: HardwareProfile, dtype: torch.dtype) -> list[KernelRow]:
    """Sampling from float32 logits of a Llama-3 vocabulary; bytes: the logits, read once.

    ``dtype`` is not used: the model's logits are float32.
    """
    device = torch.device(profile.device)
    counts, vocab = ((1, 128), 128256) if device.type == "cuda" else ((4,), 49152)
    ways = {"greedy": (0.0, 0, 1.0), "temperature": (1.0, 0, 1.0), "top-k 50": (1.0, 50, 1.0),
            "top-p 0.9": (1.0, 0, 0.9), "both": (1.0, 50, 0.9)}  # fmt: skip
    rows, limit = [], profile.ceilings.read_GBps / 1e3
    for count in counts:
        logits = 3 * torch.randn(count, vocab, device=device)
        seeds = torch.arange(count, device=device)
        for name, (temperature, top_k, top_p) in ways.items():
            given = (
                torch.full((count,), temperature, device=device),
                torch.full((count,), top_k, dtype=torch.int32, device=device),
                torch.full((count,), top_p, device=device),
                seeds,
                seeds,
            )
            elapsed_s = time_s(lambda _, x=logits, g=given: sample_tokens(x, *g), device)  # type: ignore[misc]
            rate = logits.nbytes / elapsed_s / 1e12
            rows.append(KernelRow("sample", f"{count} {name}", "TB/s", elapsed_s, rate, limit))
    return rows


def print_table(rows: Sequence[KernelRow]) -> None:
    """One line a row."""
    print(f"{'kernel':<17} {'shape':<34} {'µs':>8} {'achieved':>9} {'limit':>7} {'unit':<8} "
          f"{'fraction':>8} {'peer':>6} {'ratio':>6}")  # fmt: skip
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        time = f"{row.time_s * 1e6:>8.1f} {row.achieved:>9.3g} {row.limit:>7.3g} {row.unit:<8}"
        print(f"{row.kernel:<17} {row.shape:<34} {time} {row.fraction:>8.1%} {peer:>6} {ratio:>6}")
