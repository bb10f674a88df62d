"""A dense layer's matrix products beside cuBLAS and a large product, on a chip under load.

Run it with ``python -m ch15_helpers.bench.products --device cuda``. cuBLAS, our way (which is
cuBLAS, too, where :func:`~ch15_helpers.kernels.hopper_gemm.choose_way` says so) and a product of
8192 x 8192 x 8192 take turns for half a second each, so that all three have the same clock; a
limit from a cold chip would be up to a quarter too high. The large product's rate is no limit: on
an H200 the products of 8448 tokens ran faster than it. Products that end in SwiGLU are followed
by that kernel where cuBLAS does them. Weights rotate, so that none is found in the cache. On a CPU
the sizes are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import linear as library_linear

from ch15_helpers.bench.moe import in_turn_s
from ch15_helpers.bench.roofline import Work, memory_s
from ch15_helpers.errors import HardwareError
from ch15_helpers.hardware import HardwareProfile
from ch15_helpers.kernels.dispatch import num_processors
from ch15_helpers.kernels.hopper_gemm import choose_way
from ch15_helpers.kernels.linear import gated_linear, linear
from ch15_helpers.kernels.swiglu import swiglu
from ch15_helpers.model.config import LLAMA3_8B, TINY, ModelConfig

_WEIGHTS = 4  # of 33 MB at least: more than a cache holds


@dataclass(frozen=True)
class ProductRow:
    """One product at one number of tokens. Seconds of a call; ``way`` as ``choose_way`` says.

    Attributes:
        large_s: what it would take at the rate of the large product in turn with it, or to read.
    """

    name: str
    num_tokens: int
    way: str
    library_s: float
    ours_s: float
    large_s: float

    @property
    def of_large(self) -> float:
        """Our rate over the large product's."""
        return self.large_s / self.ours_s

    @property
    def speedup(self) -> float:
        return self.library_s / self.ours_s


def layer_products(config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """Name to (rows of the weight, depth, whether SwiGLU follows) of a layer's products."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (heads * config.head_dim, hidden, False),
        "o": (hidden, config.num_attention_heads * config.head_dim, False),
        "gate_up": (2 * inner, hidden, True),
        "down": (hidden, inner, False),
    }


@torch.inference_mode()
def measure_product(
    name: str, config: ModelConfig, num_tokens: int, profile: HardwareProfile, least_s: float = 0.5
) -> ProductRow:
    """Times one product of a layer, on the profile's device, in bfloat16 there and float32 here."""
    device = torch.device(profile.device)
    on_cuda = device.type == "cuda"
    dtype, size = (torch.bfloat16, 8192) if on_cuda else (torch.float32, 256)
    rows, depth, gated = layer_products(config)[name]
    width = rows // 2 if gated else rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x = normal(num_tokens, depth)
    weights = [normal(rows, depth).mul_(depth**-0.5) for _ in range(_WEIGHTS)]
    a, b, turns = normal(size, size), normal(size, size), count()

    def library() -> Tensor:
        y = library_linear(x, weights[next(turns) % _WEIGHTS])
        return swiglu(y) if gated else y

    def ours() -> Tensor:
        weight = weights[next(turns) % _WEIGHTS]
        return gated_linear(x, weight) if gated else linear(x, weight)

    runs: list[Callable[[], object]] = [library, ours, lambda: torch.mm(a, b)]
    library_s, ours_s, product_s = in_turn_s(runs, device, least_s)
    work = Work(2.0 * num_tokens * rows * depth, float(rows * depth * dtype.itemsize))
    large = max(memory_s(work, profile.ceilings), work.flops * product_s / (2 * size**3))
    way = choose_way(num_tokens, width, gated, num_processors(device)) if on_cuda else None
    return ProductRow(name, num_tokens, way or "library", library_s, ours_s, large)


def main(
    tokens: Annotated[str, typer.Option(help="Token counts, by commas; default by device.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Time a layer's products: the library, ours, a large product in turn, speed-up."""
    from rich.console import Console
    from rich.table import Table

    try:
        profile = HardwareProfile.measure(device)
    except HardwareError as error:
        raise typer.BadParameter(str(error)) from error
    on_cuda = profile.device.startswith("cuda")
    config = LLAMA3_8B if on_cuda else TINY
    table = Table("product", "tokens", "way", "library µs", "ours µs", "large µs", "of large",
                  "speed-up", title=profile.describe())  # fmt: skip
    counts = tokens or ("64,128,2048,8448,32000" if on_cuda else "16")
    for number in (int(part) for part in counts.split(",")):
        for name in layer_products(config):
            row = measure_product(name, config, number, profile)
            times = (f"{t * 1e6:.1f}" for t in (row.library_s, row.ours_s, row.large_s))
            table.add_row(name, str(number), row.way, *times, f"{row.of_large:.2f}",
                          f"{row.speedup:.3f}")  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
