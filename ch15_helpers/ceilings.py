"""Measuring a device's limits: bandwidths, matmul rates, the cost of a launch, the host link.

Part of ``hardware``, which is the module to import from.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ch15_helpers.errors import HardwareError

GIB = 1024**3


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device.

    Attributes:
        read_GBps: streaming read, 1e9 bytes per second, buffer larger than the last-level cache.
        copy_GBps: device-to-device copy, read plus written bytes.
        matmul_tflops: dtype name (``float32``, ``bfloat16``, …) to 1e12 operations per second.
        launch_us: host cost of one tiny operation, microseconds, steady state.
        host_link_GBps: pinned host-to-device copy, the slower direction; None on a CPU.
    """

    read_GBps: float
    copy_GBps: float
    matmul_tflops: Mapping[str, float]
    launch_us: float
    host_link_GBps: float | None

    def tflops(self, dtype: torch.dtype | str) -> float:
        """Measured matmul ceiling for a dtype, 1e12 operations per second.

        Raises:
            HardwareError: that dtype was not measured.
        """
        name = dtype_name(dtype)
        if name not in self.matmul_tflops:
            raise HardwareError(
                f"no matmul ceiling was measured for dtype {name!r}; "
                f"measured: {', '.join(self.matmul_tflops)}"
            )
        return self.matmul_tflops[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, rounded to four significant digits."""
        out: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                out[name] = {k: _round(v) for k, v in value.items()}
            else:
                out[name] = None if value is None else _round(value)
        return out


def dtype_name(dtype: torch.dtype | str) -> str:
    """``torch.bfloat16`` or ``"bfloat16"`` → ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache that the operating system reports; 32 MiB where it does not."""
    sizes = [32 * 1024**2]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            sizes.append(int(found.group(1)) * 1024 ** " KMG".index(found.group(2) or " "))
    return max(sizes)


@functools.lru_cache(maxsize=8)
def measure_ceilings(device: str = "cpu", cpu_threads: int | None = None) -> Ceilings:
    """Measure a device's limits; cached per process for a device and thread count.

    Bandwidth buffers exceed the last-level cache. Each figure is the best of three timed
    attempts after a warm-up: a ceiling is what the device can do, not what it did on average.

    Args:
        device: torch device string, already resolved.
        cpu_threads: only separates cache entries; the measurement uses torch's current threads.
    """
    dev = torch.device(device)
    buffer = _bandwidth_buffer(dev)
    read, copy = _read_GBps(buffer), _copy_GBps(buffer)
    link = _host_link_GBps(dev) if dev.type == "cuda" else None
    del buffer
    if dev.type == "cuda":
        torch.cuda.empty_cache()
    names = ("float32", "bfloat16", "float16") if dev.type == "cuda" else ("float32", "bfloat16")
    return Ceilings(
        read_GBps=read,
        copy_GBps=copy,
        matmul_tflops={name: _matmul_tflops(dev, name) for name in names},
        launch_us=_launch_us(dev),
        host_link_GBps=link,
    )


def _bandwidth_buffer(device: torch.device) -> torch.Tensor:
    """Flat float32 buffer for streaming: GPUs 4 GiB, CPUs twice the cache up to 1 GiB.

    A cyclic sweep over twice the cache gets no hits from it. A server reports a socket's cache
    (480 MiB and more), of which a small machine has a share, so 1 GiB is enough; touching more
    would spend the time on page faults.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(4 * GIB, free // 4)
    else:
        size = min(max(2 * last_level_cache_bytes(), GIB // 4), GIB, _available_bytes() // 4)
    return torch.full((int(size) // 8192 * 2048,), 1.0, dtype=torch.float32, device=device)


def _read_GBps(x: torch.Tensor) -> float:
    """Best of three one-pass reductions: a sum, a dot product and a matrix-vector product.

    The last has the access pattern of a decode step at batch 1.
    """
    matrix = x.view(-1, 1024)
    vector = torch.ones(1024, device=x.device)
    out = torch.empty(matrix.shape[0], device=x.device)
    passes: list[Callable[[], object]] = [x.sum, lambda: torch.mv(matrix, vector, out=out)]
    if x.numel() < 2**31:
        passes.append(lambda: torch.dot(x, x))
    return x.nbytes / min(_best_s(f, x.device) for f in passes) / 1e9


def _copy_GBps(x: torch.Tensor) -> float:
    """Half of the buffer copied onto the other half; counts bytes read and bytes written."""
    half = x.numel() // 2
    target, source = x[:half], x[half : 2 * half]
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), x.device) / 1e9


def _matmul_tflops(device: torch.device, dtype: str) -> float:
    """Square matmul, large enough to fill the device, at torch's current precision settings."""
    n = (4096 if dtype == "float32" else 8192) if device.type == "cuda" else 1536
    a = torch.rand(n, n, device=device).to(getattr(torch, dtype))
    b = torch.rand(n, n, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    return 2 * n**3 / _best_s(lambda: torch.matmul(a, b, out=out), device) / 1e12


def _launch_us(device: torch.device, calls: int = 1000) -> float:
    """Wall time of many one-element operations over their number, in microseconds."""
    x = torch.zeros(1, device=device)

    def burst() -> None:
        for _ in range(calls):
            x.add_(1.0)

    return _best_s(burst, device, wall=True) / calls * 1e6


def _host_link_GBps(device: torch.device, size: int = 256 * 1024**2) -> float:
    """Pinned host memory, each direction alone, the slower of the two."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    up = _best_s(lambda: there.copy_(host, non_blocking=True), device)
    down = _best_s(lambda: host.copy_(there, non_blocking=True), device)
    return size / max(up, down) / 1e9


def _best_s(
    fn: Callable[[], object], device: torch.device, attempts: int = 3, wall: bool = False
) -> float:
    """Shortest of ``attempts`` after one warm-up; CUDA events on a GPU unless ``wall``."""
    fn()
    if device.type != "cuda" or wall:
        return min(_wall_s(fn, device) for _ in range(attempts))
    times = []
    for _ in range(attempts):
        start, end = _timing_event(), _timing_event()
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        fn()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return min(times)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall_s(fn: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _round(value: float) -> float:
    return float(f"{value:.4g}")
