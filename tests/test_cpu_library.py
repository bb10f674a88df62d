"""Our C++ for the CPU: how it is built and loaded, its numbers, and what they do not depend on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from modelzoo import make_batch, relative_error, scrambled_tables
from torch import Tensor

from ch15_helpers import load_model
from ch15_helpers.kernels import cpu_library as library_module
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.cpu_library import build_library, cpu_library, find_compiler
from ch15_helpers.kernels.linear_cpu import compiled_linear, layouts_of, pack_weight
from ch15_helpers.kernels.paged_attention import paged_attention
from ch15_helpers.kernels.paged_attention_compiled import paged_attention_compiled
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import apply_rope, build_cos_sin_cache, rope_rows
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv
from ch15_helpers.kernels.swiglu import swiglu

needs_library = pytest.mark.skipif(cpu_library() is None, reason="no C++ compiler")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _attention_case(
    query_lens: list[int],
    context_lens: list[int],
    page: int = 16,
    heads: tuple[int, int] = (6, 2),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    table_seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, BatchMetadata]:
    """Queries, K and V caches and the batch; the numbers do not depend on the pages."""
    generator = torch.Generator().manual_seed(1)
    tables, num_blocks = scrambled_tables(context_lens, page, table_seed)
    pages = torch.full((num_blocks, 2, page, heads[1], dim), float("nan"), dtype=dtype)
    q = torch.randn(sum(query_lens), heads[0], dim, generator=generator).to(dtype)
    for length, table in zip(context_lens, tables, strict=True):
        kv = torch.randn(length, 2, heads[1], dim, generator=generator).to(dtype)
        for at in range(length):
            pages[table[at // page], :, at % page] = kv[at]
    batch, _ = make_batch(query_lens, context_lens, tables, page)
    return q, pages[:, 0], pages[:, 1], batch


@needs_library
def test_torch_and_our_kernels_share_one_openmp() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    rms_norm(torch.randn(4, 64), torch.ones(64), 1e-5)
    lines = maps.read_text(encoding="utf-8").splitlines()
    assert len({line.split()[-1] for line in lines if "libgomp" in line}) == 1


@needs_library
def test_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ch15_helpers.kernels.cpu_library import *; "
        "print(load_library(build_library(find_compiler(), Path(sys.argv[1]))).ch15_width())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    widths = {racer.communicate(timeout=100)[0] for racer in racers}
    assert all(racer.returncode == 0 for racer in racers) and len(widths) == 1
    assert len(list((tmp_path / "new").iterdir())) == 1, "one library, nothing half written"
    compiler = find_compiler()
    assert compiler is not None
    built = build_library(compiler, tmp_path / "new")
    before = built.stat().st_mtime_ns
    assert build_library(compiler, tmp_path / "new").stat().st_mtime_ns == before, "built once"


def test_a_compiler_that_fails_or_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no room >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv(library_module.SWITCH, "on")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("CH15_CACHE", str(tmp_path / "cache"))
    fresh = library_module.cpu_library.__wrapped__
    with pytest.warns(RuntimeWarning, match=r"could not build them.*no room"):
        assert fresh() is None
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(library_module, "find_compiler", lambda: None)
        assert fresh() is None
        monkeypatch.setenv(library_module.SWITCH, "off")
        assert fresh() is None


def test_without_the_library_torch_computes() -> None:
    code = (
        "import torch; from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model; "
        "from ch15_helpers.kernels.paged_attention import default_backend; "
        "model = load_model('random:TINY', 'cpu'); engine = Engine(model, EngineConfig()); "
        "out = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True)); "
        "print(model.weight_layout, default_backend('cpu'), out[0].token_ids)"
    )
    outs = []
    for value in ("off", "on"):
        env = os.environ | {library_module.SWITCH: value}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        outs.append(run.stdout.split(maxsplit=2))
    assert outs[0][:2] == ["rows", "sdpa"]
    assert outs[0][2] == outs[1][2], "the same tokens"


@needs_library
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 12, 13, 24, 25, 61, 130])
@pytest.mark.parametrize("depth", [1, 63, 576])
@pytest.mark.usefixtures("two_threads")
def test_products_against_float64(rows: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(192, depth, generator=generator)
    packed = pack_weight(weight, "compiled")
    assert packed.dim() == 4
    expected = x.double() @ weight.double().T
    out, gated = compiled_linear(x, packed), compiled_linear(x, packed, gated=True)
    assert out.shape == (rows, 192) and gated.shape == (rows, 96)
    if rows:
        assert relative_error(out, expected) < 2e-6
        assert relative_error(gated, swiglu(expected)) < 3e-6


def check_rows_are_independent(x, packed, counts) -> None:
    """A product's rows depend on neither their number, nor threads, nor a NaN beside them."""
    for gated in (False, True):
        whole = compiled_linear(x, packed, gated=gated)
        for count in counts:
            assert torch.equal(compiled_linear(x[:count], packed, gated=gated), whole[:count])
        before = torch.get_num_threads()
        torch.set_num_threads(2 if before == 1 else 1)
        assert torch.equal(compiled_linear(x, packed, gated=gated), whole)
        torch.set_num_threads(before)
        spoilt = x.clone()
        spoilt[7, 3] = float("nan")
        out = compiled_linear(spoilt, packed, gated=gated)
        assert out[7].isnan().all() and torch.equal(out[8:], whole[8:])


@needs_library
def test_a_row_depends_on_itself_alone() -> None:
    """Not on the number of rows, nor on threads, nor on a NaN beside it."""
    x, packed = torch.randn(40, 300), pack_weight(torch.randn(256, 300), "compiled")
    check_rows_are_independent(x, packed, (1, 3, 12, 17))
    with pytest.raises(ValueError, match="needs float32"):
        compiled_linear(x[:, 1:], packed)


@needs_library
def test_gate_of_extreme_values() -> None:
    gates = torch.tensor([-1e30, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 1e30]).repeat(32)[:, None]
    packed = pack_weight(torch.cat((gates, torch.ones_like(gates))), "compiled")
    out = compiled_linear(torch.ones(1, 1), packed, gated=True)
    expected = torch.nn.functional.silu(gates[:, 0])
    assert torch.allclose(out[0], expected, rtol=1e-6, atol=1e-30)


@needs_library
@pytest.mark.parametrize("dim", [64, 96, 128, 256, 20])
@pytest.mark.parametrize("page", [8, 16, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("two_threads")
def test_attention_against_float64(dim: int, page: int, dtype: torch.dtype) -> None:
    """Prompts, a chunk, decodes with one span and with several; unwritten slots hold NaN."""
    case = _attention_case([1, 5, 40, 1, 1], [1, 70, 40, 530, 256], page, (9, 3), dim, dtype)
    q, k_cache, v_cache, batch = case
    out = paged_attention_compiled(*case, dim**-0.5)
    wide = [t.double() for t in (q, k_cache, v_cache)]
    expected = paged_attention(*wide, batch, dim**-0.5, "reference")
    assert out.dtype == dtype and out.shape == q.shape
    assert relative_error(out, expected) < (3e-6 if dtype == torch.float32 else 4e-3)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_query_depends_on_its_sequence_alone(dtype: torch.dtype) -> None:
    """Not on chunks, neighbours, pages or threads: so a preempted request repeats its tokens."""
    lens = [700, 33, 300]
    whole = paged_attention_compiled(*_attention_case(lens, lens, dtype=dtype), 0.125)
    starts = [0, 700, 733]
    before = torch.get_num_threads()
    for chunk, page, threads in ((1, 16, 2), (1, 64, 1), (20, 8, 2)):
        torch.set_num_threads(threads)
        q, k_cache, v_cache, batch = _attention_case(lens, lens, page, dtype=dtype, table_seed=page)
        chunks, _ = make_batch([chunk] * 3, lens, batch.block_tables.tolist(), page)
        rows = [
            row for s, n in zip(starts, lens, strict=True) for row in range(s + n - chunk, s + n)
        ]
        out = paged_attention_compiled(q[rows], k_cache, v_cache, chunks, 0.125)
        assert torch.equal(out, whole[rows])
    torch.set_num_threads(before)


@needs_library
def test_a_nan_stays_in_its_sequence() -> None:
    case = _attention_case([1, 3, 1], [50, 20, 300])
    clean = paged_attention_compiled(*case, 0.125)
    case[1][int(case[3].block_tables[1, 0]), 2] = float("nan")
    out = paged_attention_compiled(*case, 0.125)
    assert out[1:4].isnan().all()
    assert torch.equal(out[[0, 4]], clean[[0, 4]])


@needs_library
def test_a_table_that_points_nowhere_is_an_error() -> None:
    q, k_cache, v_cache, batch = _attention_case([1, 1], [20, 40])
    with pytest.raises(IndexError, match="names a block"):
        paged_attention_compiled(q, k_cache[:2], v_cache[:2], batch, 0.125)
    with pytest.raises(ValueError, match="the kernel needs float32 or bfloat16"):
        paged_attention_compiled(q.half(), k_cache.half(), v_cache.half(), batch, 0.125)
    cache = build_cos_sin_cache(64, 64, 1e4)
    q, k, v = torch.randn(2, 10, 64).split((6, 2, 2), dim=1)
    slots = torch.tensor([3, k_cache.shape[0] * 16])
    with pytest.raises(IndexError, match="a slot lies outside"):
        rope_and_write_kv(q, k, v, k_cache, v_cache, cache, torch.arange(2), slots)


@needs_library
@pytest.mark.parametrize("layer_major", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_rotation_and_write_against_float64(layer_major: bool) -> None:
    tokens, page, dim = 37, 8, 64
    qkv = torch.randn(tokens, 9 + 6, dim)
    q, k, v = qkv[:, :9], qkv[:, 9:12], qkv[:, 12:]
    pages = torch.zeros((2, 6, page, 3, dim) if layer_major else (6, 2, page, 3, dim))
    k_cache, v_cache = pages if layer_major else pages.unbind(1)
    slots = torch.randperm(48)[:tokens]
    slots[5] = -1
    cache, positions = build_cos_sin_cache(dim, 100, 1e4), torch.randint(0, 100, (tokens,))
    rotated = rope_and_write_kv(q, k, v, k_cache, v_cache, cache, positions, slots)
    rows = tuple(row.double() for row in rope_rows(cache, positions))
    wide_q, wide_k = apply_rope(q.double(), k.double(), cache, positions, (rows[0], rows[1]))
    assert relative_error(rotated, wide_q) < 1e-6
    for cached, expected in ((k_cache, wide_k), (v_cache, v)):
        kept = slots[slots >= 0]
        found = cached.reshape(-1, 3, dim)
        assert relative_error(found[kept], expected[slots >= 0]) < 1e-6
        others = torch.ones(48, dtype=torch.bool).index_fill_(0, kept, False)
        assert (found[others] == 0).all(), "only its own slots"


@needs_library
@pytest.mark.usefixtures("two_threads")
def test_norm_against_float64() -> None:
    x, residual, weight = torch.randn(33, 576), torch.randn(33, 576), torch.randn(576)
    for added in (None, residual):
        out = rms_norm(x, weight, 1e-5) if added is None else rms_norm(x, weight, 1e-5, added)[0]
        wide = x.double() if added is None else x.double() + added.double()
        scale = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        assert relative_error(out, wide * scale * weight.double()) < 1e-6
        assert torch.equal(rms_norm(x[:1], weight, 1e-5), rms_norm(x, weight, 1e-5)[:1])


@needs_library
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64-v3")
def test_the_same_bits_with_narrower_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a processor without AVX-512 computes, if this one has what it takes to run that."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2 and FMA")
    flags = tuple(f.replace("native", "x86-64-v3") for f in library_module.FLAGS)
    monkeypatch.setattr(library_module, "FLAGS", flags)
    compiler = find_compiler()
    assert compiler is not None
    narrow = library_module.load_library(build_library(compiler, tmp_path))
    assert narrow.ch15_has_tiles() == 0, "neither `grid` nor `tiles` there"
    x, weight = torch.randn(19, 576), torch.randn(192, 576)
    case = _attention_case([1, 30, 1], [300, 70, 20])
    calls = (
        lambda: compiled_linear(x, pack_weight(weight, "compiled")),
        lambda: compiled_linear(x, pack_weight(weight, "compiled"), gated=True),
        lambda: paged_attention_compiled(*case, 0.125),
        lambda: rms_norm(x, weight[0], 1e-5),
    )
    wide = [call() for call in calls]

    def other() -> ctypes.CDLL:
        return narrow

    for name in ("linear_cpu", "paged_attention_compiled", "rms_norm"):
        monkeypatch.setattr(f"ch15_helpers.kernels.{name}.cpu_library", other)
    case[3].scratch.clear()
    for ours, theirs in zip([call() for call in calls], wide, strict=True):
        assert torch.equal(ours, theirs)


@needs_library
def test_the_default_layout() -> None:
    assert "compiled" in layouts_of(torch.float32)
    assert load_model("random:TINY", "cpu").weight_layout == "compiled"
