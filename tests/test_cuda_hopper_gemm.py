"""The CUDA C++ matrix products against float64 on ragged shapes. Needs a Hopper GPU and nvcc."""

from __future__ import annotations

import pytest
import torch
from torch.utils import cpp_extension

from ch15_helpers.kernels import hopper_gemm
from ch15_helpers.kernels.hopper_gemm import can_multiply, choose_way, multiply
from ch15_helpers.kernels.linear import gated_linear, linear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(cpp_extension.CUDA_HOME is None, reason="no nvcc"),
]
if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("not a Hopper GPU", allow_module_level=True)

# (rows, weight rows, depth)
MANY = [(256, 512, 64), (300, 784, 520), (64, 272, 72), (1000, 1008, 4096), (3001, 4096, 1024)]
FEW = [(2, 1008, 2048), (5, 272, 72), (64, 256, 512), (65, 784, 520), (100, 4096, 14336)]


def inputs(num_rows, weight_rows, depth, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(num_rows, depth, generator=generator, device="cuda")
    weight = torch.randn(weight_rows, depth, generator=generator, device="cuda") * depth**-0.5
    return x.bfloat16(), weight.bfloat16()


def expected(x, weight, gated):
    y = x.double() @ weight.double().T
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def error(out, wanted):
    assert not out.isnan().any()
    return float((out.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_rows_match_float64(shape, gated):
    x, weight = inputs(*shape)
    out = multiply(x, weight, gated, "many")
    assert error(out, expected(x, weight, gated)) < 4e-3
    assert torch.equal(out, multiply(x, weight, gated, "many"))


@pytest.mark.parametrize("tile", [96, 112, 128])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_few_rows_match_float64(shape, tile):
    x, weight = inputs(*shape)
    out = multiply(x, weight, True, "few", tile)
    assert error(out, expected(x, weight, True)) < 4e-3
    assert torch.equal(out, multiply(x, weight, True, "few", tile))


@pytest.mark.parametrize(("num_rows", "way"), [(100, "few"), (2048, "many")])
def test_rows_apart_and_a_row_of_nan(num_rows, way):
    wide, weight = inputs(num_rows, 4096, 2048)
    x, weight = wide[:, 1024:], weight[:, :1024].contiguous()
    x[1, 3] = float("nan")
    out = multiply(x, weight, True, way)
    others = torch.arange(num_rows, device="cuda") != 1
    assert out[1].isnan().all()
    assert error(out[others], expected(x[others], weight, True)) < 4e-3


@pytest.mark.parametrize(("num_rows", "way"), [(16, "few"), (2048, "many")])
def test_a_replayed_graph_reads_new_rows(num_rows, way):
    x, weight = inputs(num_rows, 4096, 2048)

    def twice():  # The second product may start beside the first, whose result it needs.
        return multiply(multiply(x, weight, True, way), weight, True, way)

    twice()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = twice()
    for seed in (1, 2, 3):
        x.copy_(inputs(num_rows, 4096, 2048, seed)[0])
        graph.replay()
        first = expected(x, weight, True).bfloat16()
        assert error(out, expected(first, weight, True)) < 8e-3
        assert torch.equal(out, twice())


def test_linear_takes_the_kernels_where_they_are_chosen(monkeypatch):
    taken = []
    monkeypatch.setattr(
        hopper_gemm, "multiply", lambda *args: taken.append(args[3]) or multiply(*args)
    )
    x, weight = inputs(8192, 4096, 1024)
    assert error(linear(x, weight), expected(x, weight, False)) < 4e-3
    assert error(gated_linear(x, weight), expected(x, weight, True)) < 4e-3
    x, weight = inputs(96, 2 * 128 * 120, 256)
    wanted = choose_way(
        96, 128 * 120, True, torch.cuda.get_device_properties(0).multi_processor_count
    )
    assert error(gated_linear(x, weight), expected(x, weight, True)) < 4e-3
    assert taken == ["many", "many", *([wanted] if wanted else [])]
    x, narrow = inputs(8192, 4096, 1020)  # rows of 2040 bytes
    assert not can_multiply(x, narrow)
    assert error(linear(x, narrow), expected(x, narrow, False)) < 4e-3
    assert len(taken) == 2 + bool(wanted)
