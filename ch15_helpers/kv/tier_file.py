"""One KV block as a file: everything that decides whether it may be used stands in the file.

Layout, little endian::

    magic 8 | version u32 | header length u32 | payload length u64 | checksum 16
    header: fingerprint length u16, geometry length u16, tokens u32, fingerprint, geometry,
            every token of the prefix as i64
    payload

The checksum (blake2b) covers header and payload. The name of a file is only a hint where to look:
a digest never decides, the prefix's tokens do.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.uint8]

MAGIC = b"CH15KVBK"
VERSION = 1
_FIXED = struct.Struct("<8sIIQ16s")
_LENGTHS = struct.Struct("<HHI")


class UnusableBlock(Exception):
    """A file cannot be used; ``reason`` is a word for the statistics.

    ``foreign``: it is a sound file of another prefix or model, so it is not removed as damaged.
    """

    def __init__(self, reason: str, *, foreign: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.foreign = foreign


def make_header(fingerprint: str, geometry: str, prefix: Sequence[int]) -> bytes:
    """What a block must be to be used: the model, the shape and all tokens up to its end."""
    model, shape = fingerprint.encode(), geometry.encode()
    tokens = np.asarray(prefix, dtype="<i8").tobytes()
    return _LENGTHS.pack(len(model), len(shape), len(prefix)) + model + shape + tokens


def write_block(path: Path, header: bytes, payload: Row, *, fsync: bool) -> None:
    """Write under a temporary name, then rename: the name never shows half a file.

    Raises:
        OSError: nothing stays behind under either name, as far as the file system allows.
    """
    view = payload.data.cast("B")
    checksum = _checksum(header, view)
    start = _FIXED.pack(MAGIC, VERSION, len(header), len(view), checksum) + header
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            for part in (memoryview(start), view):
                while part:
                    part = part[file.write(part) :]
            if fsync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_block(path: Path, header: bytes, out: Row) -> None:
    """Fill ``out`` with the payload, if the file is sound and has exactly this header.

    ``out`` may be overwritten even when this raises.

    Raises:
        UnusableBlock: with the reason; a missing file counts as one.
    """
    view = out.data.cast("B")
    try:
        with path.open("rb", buffering=0) as file:
            fixed = file.read(_FIXED.size)
            if len(fixed) < _FIXED.size:
                raise UnusableBlock("truncated")
            magic, version, header_len, payload_len, checksum = _FIXED.unpack(fixed)
            if magic != MAGIC or version != VERSION:
                raise UnusableBlock("not a block file")
            actual = os.fstat(file.fileno()).st_size
            if actual != _FIXED.size + header_len + payload_len:
                raise UnusableBlock("truncated")
            found = file.read(header_len)
            if found != header or payload_len != len(view):
                raise UnusableBlock(_difference(found, header), foreign=True)
            _read_fully(file.fileno(), view)
    except FileNotFoundError:
        raise UnusableBlock("missing file") from None
    except OSError:
        raise UnusableBlock("read error") from None
    if _checksum(header, view) != checksum:
        raise UnusableBlock("checksum")


def is_complete(path: Path) -> bool:
    """Whether a file begins like a block and has the length that it claims; reads 40 bytes."""
    try:
        with path.open("rb", buffering=0) as file:
            fixed = file.read(_FIXED.size)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(fixed) < _FIXED.size:
        return False
    magic, version, header_len, payload_len, _ = _FIXED.unpack(fixed)
    return bool(
        magic == MAGIC and version == VERSION and size == _FIXED.size + header_len + payload_len
    )


def _read_fully(descriptor: int, view: memoryview) -> None:
    at = 0
    while at < len(view):
        got = os.readv(descriptor, [view[at:]])
        if not got:
            raise UnusableBlock("truncated")
        at += got


def _checksum(header: bytes, payload: memoryview) -> bytes:
    digest = hashlib.blake2b(header, digest_size=16)
    digest.update(payload)
    return digest.digest()


def _difference(found: bytes, expected: bytes) -> str:
    """Which part of two headers differs, in words."""
    if len(found) < _LENGTHS.size:
        return "other geometry"
    model, shape, _ = _LENGTHS.unpack_from(expected)
    model_end = _LENGTHS.size + model
    if found[: _LENGTHS.size][:2] != expected[:2] or found[8:model_end] != expected[8:model_end]:
        return "other model"
    if found[2:4] != expected[2:4] or (
        found[model_end : model_end + shape] != expected[model_end : model_end + shape]
    ):
        return "other geometry"
    return "other prefix"
