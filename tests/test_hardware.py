"""Hardware keys and measured ceilings."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch15_helpers import ceilings, hardware
from ch15_helpers.bench.schema import check_hardware
from ch15_helpers.errors import HardwareError


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100_mig_1g"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_slug_of_a_gpu_name(name: str, slug: str) -> None:
    assert hardware.gpu_slug(name) == slug


@given(st.text(max_size=40))
def test_slug_is_a_file_name_or_an_error(name: str) -> None:
    try:
        slug = hardware.gpu_slug(name)
    except HardwareError:
        return
    assert slug.replace("_", "").isalnum()
    assert slug.isascii()


def test_key_counts_the_devices_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert hardware.hardware_key("auto") == "h200"
    assert hardware.hardware_key("cuda", 2) == "2x_h200"
    assert hardware.hardware_key("cpu", 2) == "cpu"
    with pytest.raises(HardwareError, match=r"3 GPUs were asked for and 2 are here"):
        hardware.hardware_key("cuda", 3)
    with pytest.raises(HardwareError, match="num_devices is 0"):
        hardware.hardware_key("cuda", 0)


@pytest.mark.parametrize("device", ["tpu", "cuda:97", "mps", ""])
def test_absent_device_lists_what_exists(device: str) -> None:
    with pytest.raises(HardwareError, match=r"expected auto or one of: cpu"):
        hardware.resolve_device(device)


def test_cpu_ceilings_are_plausible_and_quick() -> None:
    ceilings.measure_ceilings.cache_clear()
    start_s = time.process_time()
    profile = hardware.HardwareProfile.measure("cpu")
    # Process time over all threads, because other processes may hold the cores.
    assert time.process_time() - start_s < 6 * max(1, torch.get_num_threads() / 2)
    c = profile.ceilings
    assert 0.5 < c.read_GBps < 2000
    assert 0.3 < c.copy_GBps < 4000
    assert 1e-3 < c.matmul_tflops["float32"] < 100
    assert 0.05 < c.launch_us < 500
    assert c.host_link_GBps is None
    assert check_hardware(profile.block())["name"] == profile.name
    assert profile.key == "cpu"
    assert f"{c.read_GBps:.3g} GB/s" in profile.describe()


def test_a_second_profile_measures_nothing() -> None:
    first = hardware.HardwareProfile.measure("cpu")
    assert hardware.HardwareProfile.measure("cpu").ceilings is first.ceilings


def test_bandwidth_counts_the_bytes_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.ones(2048 * 64)
    monkeypatch.setattr(ceilings, "_best_s", lambda *_, **__: 1.0)
    assert ceilings._read_GBps(buffer) == pytest.approx(2048 * 64 * 4 / 1e9)
    # A copy of half the buffer reads half and writes half: the whole buffer's bytes.
    assert ceilings._copy_GBps(buffer) == pytest.approx(2048 * 64 * 4 / 1e9)


def test_ceiling_of_an_unmeasured_dtype_is_an_error() -> None:
    c = ceilings.Ceilings(10.0, 10.0, {"float32": 1.0}, 1.0, None)
    assert c.tflops(torch.float32) == c.tflops("float32") == 1.0
    with pytest.raises(HardwareError, match=r"'float16'; measured: float32"):
        c.tflops(torch.float16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_profile() -> None:
    profile = hardware.HardwareProfile.measure("cuda")
    assert profile.key == hardware.gpu_slug(torch.cuda.get_device_name())
    assert profile.driver
    assert profile.ceilings.read_GBps > 100
    assert profile.ceilings.tflops("bfloat16") > profile.ceilings.tflops("float32")
    assert profile.ceilings.host_link_GBps
    assert profile.ceilings.host_link_GBps > 1
