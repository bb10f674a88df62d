"""Matrix products in CUDA C++ for Hopper GPUs (compute capability 9.0), built at their first use.

Why not Triton: it has no copies into two blocks of a cluster at once (multicast), which save the
power that limits a large product. ``hopper_gemm.cu`` takes many rows, ``hopper_gemm_few.cu`` a
decode step's; the files say how they work and what they are made after.

Operations: ``2 * rows * width * depth``, twice that with ``gated``. Bytes: the weight and the rows
once, the result once. With ``gated`` the activation is part of the product: what it would read and
write again, three times the result, is saved. Where nvcc is missing, or whole tiles would leave
part of the GPU idle, cuBLAS multiplies: see :func:`choose_way`.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from subprocess import SubprocessError
from typing import Literal

import torch
from torch import Tensor

from ch15_helpers.errors import HardwareError
from ch15_helpers.kernels.dispatch import is_hopper, num_processors

_SOURCES = ("hopper_gemm.cu", "hopper_gemm_few.cu")
_FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a")
_TILE_ROWS, _TILE_WIDTH = 256, 256
_FEW_ROWS = 128
_FEW_TILES = (96, 112, 128)  # columns of the result that one block takes

Way = Literal["many", "few"]


def fills(num_rows: int, width: int, gated: bool, processors: int) -> float:
    """Fraction of the GPU's time that does wanted work, if each pair of blocks takes whole tiles.

    A last round that is not full, and rows of a tile that are not there, are what is lost.
    """
    tile_width = _TILE_WIDTH // 2 if gated else _TILE_WIDTH
    items = -(-num_rows // _TILE_ROWS) * -(-width // tile_width)
    rounds = -(-items // max(1, processors // 2))
    wanted = num_rows * width / (_TILE_ROWS * tile_width)
    return wanted / (rounds * max(1, processors // 2))


def few_tile(width: int, processors: int) -> int | None:
    """The narrowest tile of few rows of which each processor takes one at most; None: none is.

    Each block reads its part of the weight: the more of them, the more of the GPU's memory they
    keep busy.
    """
    fitting = (tile for tile in _FEW_TILES if -(-width // tile) <= processors)
    return next(fitting, None)


def choose_way(num_rows: int, width: int, gated: bool, processors: int) -> Way | None:
    """Which kernel takes a product, None where cuBLAS is as good or better.

    Args:
        num_rows: rows of x. width: columns of the result.
        gated: whether SwiGLU is part of it. processors: multiprocessors of the GPU.
    """
    # On one H200, µs, cuBLAS (with the activation after it where it is gated) and this. Captured,
    # depth 4096, width 14336 (128 tiles of 112): 128 rows 69.4 and 62.8; 64 rows 64.2 and 58.8; 32
    # rows 59.6 and 57.9; 16 rows 58.5 and 57.6. 128 and 16 rows, other widths: 8192 (86 tiles of
    # 96) 41.1 and 40.4, 35.1 and 38.1; 11008 (115 of 96) 54.3 and 51.1, 47.8 and 45.8; 12288 (128
    # of 96) 58.7 and 54.2, 50.7 and 50.0; 16896 (132 of 128) 80.9 and 74.3, 68.8 and 67.4. Tiles of
    # 128 take 65.2 where those of 112 take 62.8.
    # Plain products, their depth split over clusters of four blocks whose sums meet in shared
    # memory, were written and not kept; cuBLAS and they, 128 and 64 rows: 4096 x 4096 13.5 and
    # 14.5, 11.9 and 12.0; 6144 x 4096 16.5 and 20.5, 16.2 and 16.7; 4096 x 14336 37.1 and 36.5,
    # 35.7 and 32.0. (Of 132 processors only 120 are in clusters of four at once.)
    if num_rows <= _FEW_ROWS:
        tile = few_tile(width, processors)
        fills_one = tile is not None and -(-width // tile) >= 0.8 * processors
        return "few" if gated and num_rows >= 16 and fills_one else None
    # For seconds, width 14336, depth 4096, gated: 1536 rows fill 0.93 of the GPU, 554 and 584; 3000
    # rows 0.95, 1101 and 1093; 2048 rows 0.97, 789 and 728; 32000 rows 1.0, 12120 and 11164. Plain,
    # width 4096, depth 14336: 1024 rows 0.97, 180 and 181; 2048 rows 0.97, 356 and 349; 5000 rows
    # 0.95, 853 and 899; 32000 rows 0.98, 5713 and 5486.
    # Adding the residual here, in the tiles' epilogue, saved nothing: 8448 rows and the norm after
    # them, 1494 and 1487 at depth 14336, 481 and 492 at 4096.
    least, fewest = (0.955, 1024) if gated else (0.965, 2048)
    filled = num_rows >= fewest and fills(num_rows, width, gated, processors) >= least
    return "many" if filled else None


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these: bfloat16 on a Hopper GPU, rows of whole 16 bytes."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.dim() == weight.dim() == 2
        and is_hopper(x.device)
        and weight.is_contiguous()
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.shape[1] % 8 == 0
        and weight.shape[0] % 16 == 0
        and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    )


def hopper_linear(x: Tensor, weight: Tensor, gated: bool = False) -> Tensor | None:
    """``x @ weight.T``, or with ``gated`` the SwiGLU of it; None where another way is better.

    Args:
        x: [num_rows, depth]. weight: [width, depth]; with ``gated`` [2 * width, depth], gate rows
            first.

    Returns:
        [num_rows, width]. Sums run in one order: equal inputs and shapes give equal bits.
    """
    if not len(x) or not can_multiply(x, weight):
        return None
    width = weight.shape[0] // (2 if gated else 1)
    way = choose_way(x.shape[0], width, gated, num_processors(x.device))
    if way is None or _library() is None:
        return None
    return multiply(x, weight, gated, way)


def multiply(x: Tensor, weight: Tensor, gated: bool, way: Way, tile: int | None = None) -> Tensor:
    """:func:`hopper_linear` in one way, for inputs that :func:`can_multiply`.

    Args:
        way: "few" takes 128 rows at most, and only gated products.
        tile: columns that a block takes of those; None is :func:`few_tile`'s, or the widest.

    Raises:
        HardwareError: the kernels could not be built or started.
    """
    library = _library()
    if library is None:
        raise HardwareError("the CUDA C++ matrix products are not built; use torch's linear")
    (num_rows, depth), width = x.shape, weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((num_rows, width))
    given = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), num_rows, x.stride(0), width, depth)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    if way == "few":
        assert gated
        assert num_rows <= _FEW_ROWS
        tile = tile or few_tile(width, num_processors(x.device)) or _FEW_TILES[-1]
        error = library.ch15_gemm_few(*given, tile, stream)
    else:
        error = library.ch15_gemm(*given, int(gated), num_processors(x.device), stream)
    if error:
        raise HardwareError(
            f"a matrix product of {tuple(x.shape)} and {tuple(weight.shape)} could not start: "
            f"CUDA error {error}"
        )
    return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The built kernels; None, with a warning once, where they cannot be built.

    torch keeps what it built: this takes some ten seconds once on a machine.
    """
    from torch.utils import cpp_extension

    sources = [str(Path(__file__).with_name(name)) for name in _SOURCES]
    try:
        if cpp_extension.CUDA_HOME is None:
            raise OSError("no nvcc on PATH and CUDA_HOME is not set")
        path = cpp_extension.load(
            "ch15_hopper_gemm", sources, extra_cuda_cflags=list(_FLAGS), is_python_module=False
        )
        library = ctypes.CDLL(str(path))
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"the CUDA C++ matrix products were not built ({first}): cuBLAS multiplies. "
            "Install the CUDA toolkit and ninja to have them",
            stacklevel=2,
        )
        return None
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    given = [pointer] * 3 + [number, long, number, number]
    library.ch15_gemm.argtypes = [*given, number, number, pointer]
    library.ch15_gemm_few.argtypes = [*given, number, pointer]
    if library.ch15_gemm_prepare() or library.ch15_gemm_few_prepare():
        warnings.warn("the CUDA C++ matrix products did not load: cuBLAS multiplies", stacklevel=2)
        return None
    return library
