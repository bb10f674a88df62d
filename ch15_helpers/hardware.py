"""What this machine can do, measured: the ceilings that every fraction of a limit divides by.

Nothing here comes from a datasheet. A ceiling is the best of several honest attempts made now,
with the threads and settings of this process, so a virtual machine with two cores, or a GPU that
runs below its clock, is compared with itself.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import device as TorchDevice  # the profile has a field named torch

from ch15_helpers.ceilings import Ceilings, dtype_name, measure_ceilings
from ch15_helpers.errors import HardwareError

__all__ = [
    "Ceilings",
    "HardwareProfile",
    "available_devices",
    "dtype_name",
    "gpu_slug",
    "hardware_key",
    "measure_ceilings",
    "resolve_device",
]

_VENDOR_WORDS = {"nvidia", "amd", "geforce", "tesla", "instinct", "graphics", "gpu"}


@dataclass(frozen=True)
class HardwareProfile:
    """A device, the software that drives it and its measured ceilings.

    Attributes:
        key: name of its expectations file: ``cpu``, ``h200``, ``2x_h200``.
        name: what the driver or the operating system calls it.
        device: torch device string.
        driver: GPU driver version, or None on a CPU.
        torch: torch version. triton: Triton version or None.
        num_devices: devices that the work uses.
        cpu_threads: threads torch uses in this process.
        ceilings: measured limits of one device.
    """

    key: str
    name: str
    device: str
    driver: str | None
    torch: str
    triton: str | None
    num_devices: int
    cpu_threads: int
    ceilings: Ceilings

    @classmethod
    def measure(cls, device: str | TorchDevice = "auto", num_devices: int = 1) -> HardwareProfile:
        """Measure this machine: under 3 s on a CPU; ceilings are cached in the process.

        Raises:
            HardwareError: the device, or that many of them, is not there.
        """
        resolved = resolve_device(device)
        return cls(
            key=hardware_key(resolved, num_devices),
            name=device_name(resolved),
            device=str(resolved),
            driver=_driver_version(resolved),
            torch=torch.__version__,
            triton=_triton_version(),
            num_devices=num_devices,
            cpu_threads=torch.get_num_threads(),
            ceilings=measure_ceilings(str(resolved), torch.get_num_threads()),
        )

    def block(self) -> dict[str, Any]:
        """The ``hardware`` block of an expectations file (plain JSON values)."""
        return {
            "name": self.name,
            "driver": self.driver,
            "torch": self.torch,
            "triton": self.triton,
            "ceilings": self.ceilings.to_dict(),
        }

    def describe(self) -> str:
        """One line for a notebook's environment cell."""
        c = self.ceilings
        flops = ", ".join(f"{k} {v:.3g}" for k, v in c.matmul_tflops.items())
        link = "" if c.host_link_GBps is None else f", host link {c.host_link_GBps:.3g} GB/s"
        return (
            f"{self.key}: {self.name}; torch {self.torch}; read {c.read_GBps:.3g} GB/s, "
            f"copy {c.copy_GBps:.3g} GB/s, matmul TFLOP/s {flops}, "
            f"launch {c.launch_us:.2g} µs{link}"
        )


def resolve_device(device: str | TorchDevice = "auto") -> TorchDevice:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        HardwareError: unknown or absent device; lists what exists.
    """
    if str(device) == "auto":
        return TorchDevice("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = TorchDevice(device)
    except RuntimeError:
        raise HardwareError(_no_such_device(str(device))) from None
    if resolved.type not in ("cpu", "cuda"):
        raise HardwareError(_no_such_device(str(device)))
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise HardwareError(_no_such_device(str(device)))
    return resolved


def available_devices() -> list[str]:
    """Devices that exist here: ``cpu``, then ``cuda:0 (NVIDIA H200)`` and so on."""
    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus]


def gpu_slug(name: str) -> str:
    """File-name form of a GPU's name, without vendor, memory size and memory kind.

    ``NVIDIA H200`` → ``h200``; ``NVIDIA H100 80GB HBM3`` → ``h100``. What changes the speed
    stays: ``NVIDIA H100 PCIe`` → ``h100_pcie``; a MIG slice keeps ``mig_1g``.

    Raises:
        HardwareError: nothing is left of the name.
    """
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w and w not in _VENDOR_WORDS]
    noise = re.compile(r"\d+[gm]i?b|hbm\d*e?|sxm\d*")
    kept = [w for w in words if not noise.fullmatch(w)]
    if not kept:
        raise HardwareError(f"cannot make a hardware key from the device name {name!r}")
    return "_".join(kept)


def hardware_key(device: str | TorchDevice = "auto", num_devices: int = 1) -> str:
    """Expectations key: ``cpu``, a GPU's slug, or ``{n}x_`` and the slug for n > 1.

    Raises:
        HardwareError: fewer than ``num_devices`` GPUs, or ``num_devices`` below 1.
    """
    resolved = resolve_device(device)
    if num_devices < 1:
        raise HardwareError(f"num_devices is {num_devices}; expected 1 or more")
    if resolved.type == "cpu":
        return "cpu"
    have = torch.cuda.device_count()
    if num_devices > have:
        raise HardwareError(
            f"{num_devices} GPUs were asked for and {have} are here: "
            f"{', '.join(available_devices())}"
        )
    slug = gpu_slug(torch.cuda.get_device_name(resolved))
    return slug if num_devices == 1 else f"{num_devices}x_{slug}"


def device_name(device: TorchDevice) -> str:
    """The GPU's name, or the processor's model with the threads that torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        name = found.group(1).strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def _driver_version(device: TorchDevice) -> str | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML's binding is optional and its errors are its own
        found = Path("/proc/driver/nvidia/version")
        if not found.exists():
            return "unknown"
        match = re.search(r"Module\s+([\d.]+)", found.read_text())
        return match.group(1) if match else "unknown"


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _no_such_device(device: str) -> str:
    return (
        f"device {device!r} is not here; expected auto or one of: {', '.join(available_devices())}"
    )
