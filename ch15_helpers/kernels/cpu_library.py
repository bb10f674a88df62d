"""The CPU kernels: C++ beside this file, compiled on first use for the processor at hand.

A kernel of ours is a plain C function on raw pointers, so that it needs none of torch's headers
and compiles in two seconds. The result is kept in the cache directory under a name that changes
with the sources, the compiler and the processor; processes that build it at the same time each
write their own file and rename it, and either is good.

Threads are OpenMP's. The library asks for ``libgomp.so.1``, which torch has already loaded from its
own folder, so both use one pool of threads; how many is passed in every call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

SOURCES = (
    "cpu_linear.cpp",
    "cpu_grid.cpp",
    "cpu_bfloat16.cpp",
    "cpu_attention.cpp",
    "cpu_pointwise.cpp",
    "cpu_layer.cpp",
    "cpu_digest.cpp",
)
HEADERS = ("cpu_attention_tiles.h", "cpu_threads.h", "cpu_tiles.h", "cpu_vector.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)
OPENMP = "-fopenmp"
SWITCH = "CH15_CPU_KERNELS"
_TIMEOUT_S = 120
# Work (multiplications) below which waking the other threads costs more than they save.
_MIN_WORK = 1 << 15

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ATTENTION: list[type] = [_POINTER] * 7 + [_LONG] * 10 + [_FLOAT, _INT]
_NORM: list[type] = [_POINTER] * 5 + [_LONG, _LONG, _FLOAT, _INT]
_ROPE: list[type] = [_POINTER] * 9 + [_LONG] * 9 + [_INT]
_SIGNATURES: dict[str, list[type]] = {
    "ch15_width": [],
    "ch15_linear": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT],
    "ch15_gated_linear": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT],
    "ch15_has_tiles": [],
    "ch15_linear_bfloat16": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT, _INT],
    "ch15_grid_bytes": [_LONG],
    "ch15_grid_pack": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT],
    "ch15_grid_unpack": [_POINTER, _LONG, _LONG, _POINTER, _LONG],
    "ch15_grid_linear": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG, _INT, _INT],
    "ch15_attention_float32": _ATTENTION,
    "ch15_attention_bfloat16": _ATTENTION,
    "ch15_digest": [_POINTER, *[_LONG] * 4, *[_POINTER] * 4],
    "ch15_layer": [_POINTER] * 6,
    "ch15_layer_bfloat16": [_POINTER] * 6,
    "ch15_rms_norm": _NORM,
    "ch15_rms_norm_bfloat16": _NORM,
    "ch15_rope_write": _ROPE,
    "ch15_rope_write_bfloat16": _ROPE,
}


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler, it fails, or SWITCH is ``off``.

    A machine without a compiler is nothing to warn of: torch computes all of this, too.
    """
    if os.environ.get(SWITCH, "on").lower() in ("off", "0", "no"):
        return None
    compiler = find_compiler()
    if compiler is None:
        logging.getLogger(__name__).info("no C++ compiler on PATH: torch computes, not our kernels")
        return None
    try:
        return load_library(build_library(compiler, cache_directory()))
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"torch computes this, not our CPU kernels: {compiler} could not build them; set "
            f"{SWITCH}=off to stop trying. It said: {str(text)[-500:]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def find_compiler() -> str | None:
    """The C++ compiler: what ``CXX`` names, else the system's."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``CH15_CACHE``, or the user's cache directory."""
    given = os.environ.get("CH15_CACHE")
    if given:
        return Path(given).expanduser() / "kernels"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ch15-book" / "kernels"


def build_library(compiler: str, directory: Path) -> Path:
    """Compiles the kernels unless that has been done, and returns the library's path.

    Raises:
        OSError: the directory cannot be written, or the compiler not be run.
        subprocess.SubprocessError: the compiler failed, with and without OpenMP.
    """
    here = Path(__file__).parent
    path = directory / f"cpu-{_fingerprint(compiler, here)}.so"
    if path.is_file():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    command = [compiler, *FLAGS, *(str(here / source) for source in SOURCES), "-o", name]
    try:
        try:
            _run([*command, OPENMP])
        except subprocess.CalledProcessError:
            _run(command)  # one thread: clang on macOS has no OpenMP
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def load_library(path: Path) -> ctypes.CDLL:
    """Opens a library and declares its functions; torch, and so its OpenMP, is loaded already.

    Raises:
        OSError: it is no library, or lacks a function.
    """
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{path} has no {name}; delete it, and it is built anew") from error
        function.argtypes, function.restype = arguments, None
    for name in ("ch15_width", "ch15_has_tiles", "ch15_grid_bytes", "ch15_grid_pack"):
        getattr(library, name).restype = _LONG
    return library


def threads_for(work: int) -> int:
    """Threads for a number of multiplications: torch's, or one where there is little to do."""
    return torch.get_num_threads() if work > _MIN_WORK else 1


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _fingerprint(compiler: str, here: Path) -> str:
    """Changes with whatever decides what the library holds, and whether it runs here."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=_TIMEOUT_S
    ).stdout
    digest = hashlib.sha256(version)
    for part in (compiler, *FLAGS, OPENMP, platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What ``-march=native`` looks at: the processor's model and abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
