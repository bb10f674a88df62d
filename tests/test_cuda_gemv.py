"""One token's product against float64."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.kernels.linear import gated_linear, linear
from ch15_helpers.kernels.rms_norm import rms_norm

gemv_triton = pytest.importorskip("ch15_helpers.kernels.gemv_triton")
rms_norm_triton = pytest.importorskip("ch15_helpers.kernels.rms_norm_triton")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def near(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((out.double() - expected).norm() <= 6e-3 * expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("features", "width"), [(960, 576), (6144, 4096), (4096, 14336), (4, 8), (2052, 1032)]
)
def test_products_and_gated_products(features: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, width, device="cuda").to(dtype)
    weight = (torch.randn(features, width, device="cuda") * width**-0.5).to(dtype)
    exact = x.double() @ weight.double().T
    assert near(linear(x, weight), exact)
    gate, up = exact.chunk(2, -1)
    assert near(gated_linear(x, weight), torch.nn.functional.silu(gate) * up)


def test_a_chain_of_early_launches_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm, product, gated product, many times over: a read before its write would change it."""
    torch.manual_seed(0)
    hidden, inner = 2048, 4096
    weights = [
        (
            (torch.randn(2 * inner, hidden) * hidden**-0.5).to("cuda", torch.bfloat16),
            (torch.randn(hidden, inner) * 0.02).to("cuda", torch.bfloat16),
        )
        for _ in range(12)
    ]
    ones = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)

    def run(x: torch.Tensor) -> torch.Tensor:
        residual = x
        for first, second in weights:
            h, residual = rms_norm(x, ones, 1e-5, residual)
            x = linear(gated_linear(h, first), second)
        return x

    x = torch.randn(1, hidden, device="cuda", dtype=torch.bfloat16)
    early = run(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    for module in (gemv_triton, rms_norm_triton):
        monkeypatch.setattr(module, "launches_early", lambda device: False)
    in_turn = run(x)
    assert torch.equal(early, in_turn)
    for _ in range(50):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, in_turn)
