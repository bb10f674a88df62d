"""The fused mixture-of-experts block beside its limits and beside vLLM's recorded times.

Run it with ``python -m ch15_helpers.bench.moe --device cuda``. Routing is given and random; a call
permutes, multiplies, activates, multiplies and combines. Inputs rotate, so that few tokens do not
find their experts in the cache of the call before. The limit is the larger of the bytes of the
experts in use over the read bandwidth and the operations over the matmul rate, both measured in
the same run.

That limit is of a cold chip: its matmul rate is the best of three single products, of uniform
numbers. Under load a GPU lowers its clock to stay within its power, and numbers of both signs need
more of it. One H200 on 2026-11-24, TFLOP/s of a bf16 product of 8192 x 8192 x 8192: uniform numbers
843 once and 732 for a second; normal ones, as the block has, 799 once and 660 to 675 for a second.
So each row also has a *sustained* time and limit: the block and that product in turn, 20 ms each,
for half a second each at least.

Where 90 % is not reached, and why. Same machine, bf16; against a cold rate of 757 TFLOP/s and reads
of 4.35 TB/s unless said otherwise, µs captured:

- Mixtral, 64 tokens. The weights of all experts take 648 to read, 0.97 of vLLM's 668. No kernel can
  be below 0.9 of it.
- Mixtral, 1024: 1366 eager and 1489 captured in one run, on an H200 whose matmul rate read 836
  (limit 953 at 757, 864 there). 2,048 pairs become 2,340 rows, since tensor cores take 64 at a
  time: 14 % more work. The down product has 2.2 rounds of tiles of 176 µs for 132 multiprocessors,
  which takes at least 390 and took 568; 492 since half-empty tiles go last.
- Mixtral, 16384: 18350 cold (limit 14416 at 801), 18485 sustained, 0.99 of the limit in turn with
  it (632 TFLOP/s: the block itself lowers the clock). Sustained, the products run at 602 and 641;
  one dense product of each size at 613 and 636.
- Qwen3, 512: gate_up reads at 4.09 TB/s and down at 3.72; sorting and combining read no weights.
- Qwen3, 1024: 344 captured, 346 eager, 360 sustained (limit 278). 64 rows an expert, give or take
  8, are padded to 64 or 128: 11,900 rows for 8,192 pairs. With the activations 1.36 GB move, not
  1.21: 313 at the measured rate, and the products take 319. Sorting takes 9, combining 11.
- Qwen3, 16384: 2322 sustained (limit 1855 at 667 TFLOP/s), 0.80. Combining reads 537 MB and writes
  67: 142 at 4.2 TB/s. Sorting takes 11. Sustained, the products run at 569 and 550 TFLOP/s; one
  dense product of each size at 559 and 524, since memory takes its share of the power. Adding into
  the output from the product would save most of the 142, but floating-point sums in any order give
  other bits each time. Rows that stay in the cache until they are combined, 30 MB or so, are those
  of 900 tokens: 57 rows an expert, and its weights read 18 times.

An eager call can also be bound by the host. Its own time for one of Qwen3, before and since
launches are recorded and replayed (``replay_triton``), on a host that takes some 15 µs for each
launch all the same: 1 token 59 and 31 to 55, 64: 189 and 64 to 68, 1024: 257 and 67 to 77. Up to
1024 tokens one launch sorts (two did), ranks come from sorting, not from comparing all with all,
and a kernel is launched before the one before has ended. Together, eager: 64 tokens 301 to 288,
256: 316 to 301, 1024: 360 to 346; 16384 sustained: 2364 to 2322.

Tried on the wide kernel without gain: tiles of 128 x 128 (15 % slower), 4 or 16 tiles to a group
(within 3 %), four smaller buffers for results, and a second group of warps that starts one or two
pieces of K behind the first so that one writes while the other multiplies (0 to 5 % slower). Then
the same kernel in CUDA C++, alone or with clusters of two that share rows or weights (multicast),
gathering rows or from a copy, sustained, against the one in use (TFLOP/s, gate_up and down):
Qwen3, 16384: 573 and 534 at best, 569 and 550 here; Mixtral, 16384: 615 and 639, 602 and 641;
Mixtral, 1024: 442 and 464, 451 and 478. K of the down product in two or three parts, for more even
rounds: Mixtral, 1024: 1532 and 1506 µs, 1518 whole; Qwen3, 1024: 361 and 383, 341 whole. Shared
weights need experts in tiles of 256 rows. Whole blocks were within 2 % where they were not slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median
from types import MappingProxyType
from typing import Annotated

import torch
import typer
from torch import Tensor

from ch15_helpers.bench.records import expert_work, fastest_peer
from ch15_helpers.bench.roofline import Work, limit_s, memory_s
from ch15_helpers.bench.timing import measure
from ch15_helpers.errors import HardwareError
from ch15_helpers.hardware import HardwareProfile
from ch15_helpers.kernels.fused_moe import can_fuse, fused_moe
from ch15_helpers.model.config import MIXTRAL_8X7B, QWEN3_30B_A3B, TINY_MOE, ModelConfig

MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {"QWEN3_30B_A3B": QWEN3_30B_A3B, "MIXTRAL_8X7B": MIXTRAL_8X7B, "TINY_MOE": TINY_MOE}
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, gate_up, down, weights, expert ids


@dataclass(frozen=True)
class MoERow:
    """One block at one number of tokens.

    Attributes:
        eager_s: median of calls one after another.
        captured_s: the same as a CUDA graph, None where there is none.
        limit_s: see the module. fraction: limit over the better of both times.
        peer_s: vLLM's recorded time. ratio: ours over it, like for like: eager.
        sustained_s, sustained_limit_s: block and limit of a chip under load; None on a CPU.
    """

    model: str
    num_tokens: int
    eager_s: float
    captured_s: float | None
    limit_s: float
    peer_s: float | None
    sustained_s: float | None = None
    sustained_limit_s: float | None = None

    @property
    def fraction(self) -> float:
        return self.limit_s / min(self.eager_s, self.captured_s or self.eager_s)

    @property
    def sustained_fraction(self) -> float | None:
        if self.sustained_s is None or self.sustained_limit_s is None:
            return None
        return self.sustained_limit_s / self.sustained_s

    @property
    def ratio(self) -> float | None:
        return self.eager_s / self.peer_s if self.peer_s else None


def block_work(config: ModelConfig, num_tokens: int, touched: float, itemsize: int) -> Work:
    """Least bytes (weights of the experts in use) and operations of one block."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    pairs = num_tokens * config.num_experts_per_tok
    return Work(flops=2.0 * expert * pairs, bytes=touched * expert * itemsize)


def make_inputs(
    config: ModelConfig, num_tokens: int, sets: int, device: torch.device, dtype: torch.dtype
) -> list[Inputs]:
    """``sets`` batches with uniform random routing over one set of random weights."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    hidden, inner = config.hidden_size, config.moe_intermediate_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    gate_up = normal(config.num_experts, 2 * inner, hidden).mul_(hidden**-0.5)
    down = normal(config.num_experts, hidden, inner).mul_(inner**-0.5)
    inputs = []
    for _ in range(sets):
        scores = normal(num_tokens, config.num_experts).float().softmax(-1)
        weights, ids = scores.topk(config.num_experts_per_tok, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        inputs.append((normal(num_tokens, hidden), gate_up, down, weights, ids))
    return inputs


def back_to_back_s(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of one of ``calls`` calls, each timed as it follows the one before."""
    if device.type != "cuda":
        return measure(run, device=device, iterations=calls).median_s
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return float(median(start.elapsed_time(end) for start, end in pairwise(events))) / 1e3


def _captured_s(inputs: list[Inputs], device: torch.device, replays: int = 20) -> float:
    """Seconds of one block inside a graph that holds one block for each set of inputs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            fused_moe(*given)
    return back_to_back_s(graph.replay, device, replays) / len(inputs)


def in_turn_s(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    least_s: float = 0.5,
    turn_s: float = 0.02,
) -> list[float]:
    """Mean seconds of a call of each, on a GPU that does nothing else: a turn of each, and again.

    Each gets ``least_s`` in all. The device's clock settles for the load of all of them. On a CPU
    the median of ten calls of each.
    """
    if device.type != "cuda":
        return [back_to_back_s(run, device, 10) for run in runs]
    once = [back_to_back_s(run, device, 3) for run in runs]
    calls = [max(1, int(turn_s / each)) for each in once]
    turns = max(2, int(least_s / turn_s))
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for turn in range(turns + 1):
        for run, count, mine in zip(runs, calls, marks, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(count):
                run()
            end.record()
            mine.append((start, end))
        if turn % 4 == 3:  # The host is never more than a few turns ahead.
            torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)
    return [
        mean(start.elapsed_time(end) / 1e3 / count for start, end in mine[1:])
        for count, mine in zip(calls, marks, strict=True)
    ]


def sustained_s(
    run: Callable[[], object], work: Work, profile: HardwareProfile, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of a call in turn with a large dense product, and the limit at that one's rate."""
    device, size = torch.device(profile.device), 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    achieved_s, product_s = in_turn_s([run, lambda: torch.matmul(a, b, out=out)], device)
    arithmetic_s = work.flops * product_s / (2 * size**3)
    return achieved_s, max(memory_s(work, profile.ceilings), arithmetic_s)


@torch.inference_mode()
def measure_row(name: str, num_tokens: int, profile: HardwareProfile, dtype: torch.dtype) -> MoERow:
    """Times one model's block at one number of tokens, on the profile's device."""
    config, device = MODELS[name], torch.device(profile.device)
    inputs = make_inputs(config, num_tokens, 8 if num_tokens <= 64 else 2, device, dtype)
    touched = mean(len(set(given[4].flatten().tolist())) for given in inputs)
    work = block_work(config, num_tokens, touched, dtype.itemsize)
    limit = limit_s(work, profile.ceilings, dtype)
    calls = max(10, min(60, int(0.2 / limit)))
    turn = iter(range(10**9))

    def block() -> Tensor:
        return fused_moe(*inputs[next(turn) % len(inputs)])

    eager_s = back_to_back_s(block, device, calls)
    fused = can_fuse(device, dtype, config.hidden_size, config.moe_intermediate_size)
    captured_s = _captured_s(inputs, device) if fused and num_tokens <= 1024 else None
    work_name = expert_work(name, num_tokens)
    peer_us = fastest_peer("experts", work_name, profile.key) if dtype == torch.bfloat16 else None
    row = MoERow(name, num_tokens, eager_s, captured_s, limit, peer_us and peer_us / 1e6)
    if device.type != "cuda":
        return row
    loaded = sustained_s(block, work, profile, dtype)
    return replace(row, sustained_s=loaded[0], sustained_limit_s=loaded[1])


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def main(
    tokens: Annotated[str, typer.Option(help="Token counts, separated by commas.")] = (
        "1,4,16,64,256,1024,4096,16384"
    ),
    models: Annotated[str, typer.Option(help="Presets, by commas; default by device.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Time the fused block: achieved, limit, fraction, peer and ratio for each number of tokens."""
    from rich.console import Console
    from rich.table import Table

    try:
        profile = HardwareProfile.measure(device)
    except HardwareError as error:
        raise typer.BadParameter(str(error)) from error
    on_cuda = profile.device.startswith("cuda")
    names = models.split(",") if models else (list(MODELS)[:2] if on_cuda else ["TINY_MOE"])
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise typer.BadParameter(f"unknown model {unknown[0]}; expected one of {list(MODELS)}")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    table = Table("model", "tokens", "eager µs", "captured µs", "limit µs", "fraction",
                  "sustained µs", "limit µs", "fraction", "vLLM µs", "ratio",
                  title=profile.describe())  # fmt: skip
    for name in names:
        for count in (int(part) for part in tokens.split(",")):
            row = measure_row(name, count, profile, dtype)
            cells = [_us(value) for value in (row.eager_s, row.captured_s, row.limit_s)]
            loaded = [_us(row.sustained_s), _us(row.sustained_limit_s)]
            loaded.append(f"{row.sustained_fraction or 0:.2f}" if row.sustained_s else "")
            peer = "" if row.peer_s is None else f"{row.peer_s * 1e6:.0f}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            table.add_row(name, str(count), *cells, f"{row.fraction:.2f}", *loaded, peer, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
