"""All kernels but the MoE block's beside their limits, and beside peers' recorded numbers.

Run it with ``python -m ch15_helpers.bench.kernels --device cuda``. Every row is one kernel on one
shape: the rate that it achieved, the limit that was measured in the same run (read bandwidth for
decodes and sampling, matmul rate for prompts, copy bandwidth for the rest), the fraction, and
where a peer was recorded its rate and ours over it. On a GPU a time is that of a call in a graph of
several, which is how the engine launches decodes. On a CPU the shapes are smaller.
``bench.kernel_rows`` has the rows that are not attention, ``bench.moe`` the MoE block's and
``bench.products`` those of a dense layer.

Whether a kernel reads or writes outside its tensors is for CUDA's compute-sanitizer to say:
``compute-sanitizer --error-exitcode 1 python -m pytest -q tests/test_cuda_small.py`` runs every
kernel on small shapes under it (``--tool racecheck`` for races in shared memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from ch15_helpers.bench.kernel_rows import (
    LAYERS,
    KernelRow,
    Run,
    block_rows,
    pointwise_rows,
    print_table,
    sampling_rows,
    time_s,
)
from ch15_helpers.bench.records import attention_work, fastest_peer
from ch15_helpers.hardware import HardwareProfile
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.paged_attention import paged_attention


@dataclass(frozen=True)
class Case:
    """One attention call.

    Attributes:
        name: of the shape; ``query_lens`` and ``context_lens`` are its sequences.
        kv_dtype: type of the pages, None for the queries' own.
    """

    kernel: Literal["decode", "prefill"]
    name: str
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 16
    layer_major: bool = False
    kv_dtype: torch.dtype | None = None

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of K and V that a call reads at least."""
        per_token = 2 * self.kv_heads * self.head_dim * (self.kv_dtype or dtype).itemsize
        return sum(self.context_lens) * per_token

    def operations(self) -> int:
        """A multiply-add is two; two products for each query, visible key and channel."""
        lens = zip(self.query_lens, self.context_lens, strict=True)
        pairs = sum(n * c - n * (n - 1) // 2 for n, c in lens)
        return 4 * self.heads * self.head_dim * pairs


def _decodes(batch: int, context: int, **shape: object) -> Case:
    name = str(shape.pop("name", f"{batch} x {context}"))
    return Case("decode", name, (1,) * batch, (context,) * batch, **shape)  # type: ignore[arg-type]


def _prompts(count: int, query: int, context: int, **shape: object) -> Case:
    name = str(shape.pop("name", f"{count} x {query} of {context}"))
    lens = (query,) * count, (context,) * count
    return Case("prefill", name, *lens, **shape)  # type: ignore[arg-type]


def gpu_cases() -> list[Case]:
    """Llama-3-8B's heads where nothing else is said: 32 query heads, 8 KV heads of 128, page 16."""
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    skewed = (16384,) * 6 + (300,) * 58
    return [
        _decodes(64, 4096),
        _decodes(128, 1024),
        _decodes(1, 512),
        _decodes(1, 8192),
        _decodes(8, 4096),
        _decodes(32, 2048),
        _decodes(256, 512),
        Case("decode", "64 skewed, 300 to 16384", (1,) * 64, skewed),
        Case("decode", "1 x 60000 and 32 x 64", (1,) * 33, (60000,) + (64,) * 32),
        _decodes(64, 4096, layer_major=True, name="64 x 4096, layer-major"),
        *(_decodes(64, 2048, page=p, name=f"64 x 2048, page {p}") for p in (8, 32, 64, 128, 256)),
        _decodes(64, 4096, head_dim=64, name="64 x 4096, head 64"),
        _decodes(64, 4096, head_dim=96, name="64 x 4096, head 96"),
        _decodes(64, 2048, heads=16, kv_heads=4, head_dim=256, name="64 x 2048, 16/4 heads of 256"),
        _decodes(64, 4096, heads=9, kv_heads=3, head_dim=64, name="64 x 4096, 9/3 heads of 64"),
        _decodes(64, 4096, kv_heads=4, name="64 x 4096, 32/4 heads"),
        _decodes(16, 4096, kv_heads=32, name="16 x 4096, 32/32 heads"),
        Case("decode", "64 x 4096, 4 queries each", (4,) * 64, (4096,) * 64),
        Case("decode", "64 x 4096, 8 queries each", (8,) * 64, (4096,) * 64),
        _decodes(64, 4096, kv_dtype=fp8, name="64 x 4096, FP8"),
        _decodes(128, 1024, kv_dtype=fp8, name="128 x 1024, FP8"),
        _decodes(64, 4096, kv_dtype=int8, name="64 x 4096, INT8"),
        _prompts(1, 8000, 8000),
        _prompts(4, 2000, 2000),
        _prompts(16, 512, 512),
        _prompts(1, 2048, 8000),
        _prompts(1, 512, 8000),
        _prompts(1, 128, 8000),
        Case("prefill", "60 decodes of 2048, 2048 of 4096", (1,) * 60 + (2048,),
             (2048,) * 60 + (4096,)),
        _prompts(1, 8000, 8000, head_dim=64, name="1 x 8000 of 8000, head 64"),
        _prompts(1, 8000, 8000, head_dim=96, name="1 x 8000 of 8000, head 96"),
        _prompts(1, 8000, 8000, heads=16, kv_heads=4, head_dim=256,
                 name="1 x 8000 of 8000, 16/4 heads of 256"),
        _prompts(1, 8000, 8000, page=256, name="1 x 8000 of 8000, page 256"),
        _prompts(1, 8000, 8000, kv_dtype=fp8, name="1 x 8000 of 8000, FP8"),
    ]  # fmt: skip


def cpu_cases() -> list[Case]:
    """SmolLM2's heads, small enough for two cores."""
    heads = {"heads": 9, "kv_heads": 3, "head_dim": 64}
    return [_decodes(16, 512, **heads), _decodes(1, 512, **heads), _prompts(1, 512, 512, **heads)]


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Run, BatchMetadata]:
    """A call over random pages in random order; its argument picks the layer."""
    counts = [-(-context // case.page) for context in case.context_lens]
    blocks, width = sum(counts), max(counts)
    tail = (case.page, case.kv_heads, case.head_dim)
    shape = (LAYERS, 2, blocks, *tail) if case.layer_major else (blocks, LAYERS, 2, *tail)
    pages = torch.randn(shape, device=device, dtype=dtype)
    pages = pages.permute(2, 0, 1, 3, 4, 5) if case.layer_major else pages
    scales = None
    if case.kv_dtype is not None:
        pages = pages.mul_(30).clamp_(-120, 120).to(case.kv_dtype)
        scales = torch.full((blocks, LAYERS, 2, case.kv_heads), 1 / 32, device=device)
    order = torch.randperm(blocks)
    tables = torch.zeros(len(counts), width, dtype=torch.int32)
    for row, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        tables[row, :count] = order[end - count : end]
    starts = [0, *accumulate(case.query_lens)]
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    batch = BatchMetadata(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(case.context_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=nothing,
        logits_indices=nothing,
        max_query_len=max(case.query_lens),
        max_context_len=max(case.context_lens),
        query_lens_host=tuple(case.query_lens),
        context_lens_host=tuple(case.context_lens),
    )
    q = torch.randn(starts[-1], case.heads, case.head_dim, device=device, dtype=dtype)

    def call(turn: int) -> Tensor:
        layer = turn % LAYERS
        kv = (pages[:, layer, 0], pages[:, layer, 1])
        factors = () if scales is None else (scales[:, layer, 0], scales[:, layer, 1])
        return paged_attention(q, *kv, batch, case.head_dim**-0.5, "auto", *factors)

    return call, batch


@torch.inference_mode()
def attention_row(case: Case, profile: HardwareProfile, dtype: torch.dtype) -> KernelRow:
    """Times one attention call."""
    device = torch.device(profile.device)
    call, _ = make_inputs(case, device, dtype)
    elapsed_s = time_s(call, device)
    if case.kernel == "prefill":
        rate, limit = case.operations() / elapsed_s / 1e12, profile.ceilings.tflops(dtype)
        return KernelRow(case.kernel, case.name, "TFLOP/s", elapsed_s, rate, limit)
    rate, limit = case.kv_bytes(dtype) / elapsed_s / 1e12, profile.ceilings.read_GBps / 1e3
    work = attention_work(case.name)
    peer = fastest_peer("attention", work, profile.key) if dtype == torch.bfloat16 else None
    return KernelRow(case.kernel, case.name, "TB/s", elapsed_s, rate, limit, peer)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    only: Annotated[str, typer.Option(help="Part of a kernel's or shape's name.")] = "",
) -> None:
    """Print what each kernel achieves of its limit."""
    profile = HardwareProfile.measure(device)
    on_gpu = torch.device(profile.device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    print(profile.describe())
    cases = gpu_cases() if on_gpu else cpu_cases()
    cases = [case for case in cases if only in f"{case.kernel} {case.name}"]
    rows = [attention_row(case, profile, dtype) for case in cases]
    for name, others in (
        ("gather scatter blocks", block_rows),
        ("rms_norm rope_and_write_kv swiglu", pointwise_rows),
        ("sample", sampling_rows),
    ):
        if only in name:
            rows += others(profile, dtype)
    print_table(rows)


if __name__ == "__main__":
    typer.run(main)
