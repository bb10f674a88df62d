"""Reads GGUF containers: metadata, tensor table and dequantised tensors.

The gguf package's own reader builds several memmap objects for each of the 98,000 strings of a
vocabulary, 1.4 s for SmolLM2; this one walks the header with ``struct`` in under 0.1 s, and can
say which tensor a truncated file ends in. Layout: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ch15_helpers.errors import ModelLoadError

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)])
_Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: shape in torch's order, ggml type number, byte range in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file, memory-mapped.

    Attributes:
        path: the file.
        metadata: key to value; arrays are lists, strings are str.
        tensors: name to :class:`TensorInfo`.

    Raises:
        ModelLoadError: not a GGUF file, a version other than 2 or 3, or a truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24 or file.read(4) != b"GGUF":
                raise ModelLoadError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
            self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offset = 4
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_header()
        except (struct.error, ArithmeticError, IndexError, ValueError, TypeError) as error:
            raise ModelLoadError(
                f"{path}: truncated or corrupted GGUF header near byte {self._offset} ({error}); "
                "download the file again"
            ) from error
        for info in self.tensors.values():
            end = info.start + info.num_bytes
            if end > len(self._buffer):
                raise ModelLoadError(
                    f"{path}: truncated: tensor {info.name!r} ends at byte {end}, the file has "
                    f"{len(self._buffer)}; download the file again"
                )

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values as float32, the same bits that ggml and transformers compute."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        if info.ggml_type == 0:
            data: npt.NDArray[np.float32] = np.frombuffer(
                self._buffer, np.float32, count, info.start
            )
            return data.reshape(info.shape)
        if info.ggml_type == 3:
            blocks = np.frombuffer(self._buffer, _Q4_1, count // 32, info.start)
            return _dequantise_q4_1(blocks).reshape(info.shape)
        if info.ggml_type == 8:
            blocks = np.frombuffer(self._buffer, _Q8_0, count // 32, info.start)
            scales = blocks["scale"].astype(np.float32)[:, None]
            values = blocks["values"].astype(np.float32)
            values *= scales
            return values.reshape(info.shape)
        return self._dequantise_with_gguf(info)

    def _dequantise_with_gguf(self, info: TensorInfo) -> npt.NDArray[np.float32]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.frombuffer(self._buffer, np.uint8, info.num_bytes, info.start)
        kind = GGMLQuantizationType(info.ggml_type)
        try:
            values = dequantize(raw.reshape(*info.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise ModelLoadError(
                f"{self.path}: tensor {info.name!r} has type {kind.name}, which cannot be "
                "dequantised; use a Q4_0, Q4_1, Q8_0, K-quant, F16, BF16 or F32 file"
            ) from error
        flat: npt.NDArray[np.float32] = values.astype(np.float32, copy=False)
        return flat.reshape(info.shape)

    def _read_header(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelLoadError(f"{self.path}: GGUF version {version}, expected 2 or 3")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        table = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        data_start = -(-self._offset // alignment) * alignment
        for name, shape, ggml_type, offset in table:
            size = self._tensor_bytes(name, shape, ggml_type)
            self.tensors[name] = TensorInfo(name, shape, ggml_type, data_start + offset, size)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        dims = struct.unpack_from(f"<{num_dims}Q", self._buffer, self._offset)
        self._offset += 8 * num_dims
        return name, tuple(reversed(dims)), self._scalar("I"), self._scalar("Q")

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], ggml_type: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        except (ValueError, KeyError) as error:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} has the unknown type number {ggml_type}"
            ) from error
        count = math.prod(shape)
        if count % block:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} has {count} elements, expected a multiple of {block}"
            )
        return int(count // block * block_bytes)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._buffer, self._offset)
        self._offset += struct.calcsize(code)
        return value

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._buffer, self._offset)
        start = self._offset + 8
        if start + length > len(self._buffer):
            raise IndexError(f"a string of {length} bytes runs past the end of the file")
        self._offset = start + length
        return self._buffer[start : self._offset].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, length = self._scalar("I"), self._scalar("Q")
            code = _SCALARS.get(item_kind)
            if code is None:
                return [self._value(item_kind) for _ in range(length)]
            items = struct.unpack_from(f"<{length}{code}", self._buffer, self._offset)
            self._offset += struct.calcsize(f"<{length}{code}")
            return list(items)
        if kind not in _SCALARS:
            raise IndexError(f"unknown metadata type {kind}")
        return self._scalar(_SCALARS[kind])


def _dequantise_q4_1(blocks: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """``scale * nibble + minimum``; low nibbles are elements 0 to 15, high ones 16 to 31."""
    scale = blocks["scale"].astype(np.float32)[:, None]
    minimum = blocks["minimum"].astype(np.float32)[:, None]
    nibbles = blocks["nibbles"]
    out = np.empty((len(blocks), 32), np.float32)
    np.multiply(nibbles & 15, scale, out=out[:, :16])
    np.multiply(nibbles >> 4, scale, out=out[:, 16:])
    out += minimum
    return out
