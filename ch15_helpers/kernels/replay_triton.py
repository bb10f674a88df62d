# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A chain of Triton launches that is worked out once for a shape and then only given addresses.

For each launch Triton looks at every argument, finds the version compiled for such arguments and
encodes tensor descriptors: on the host of one H200 20 to 50 µs, more than a kernel of a decode step
runs. Here the first call of a function with some shapes is recorded: which compiled kernels it
launched, with which numbers, and which tensors, be they given, temporary or returned. Later calls
take all temporary tensors from one allocation, and launch the same kernels at the new addresses.
Unlike a CUDA graph, a recording holds no memory and copies no inputs, and it can be captured.
"""

from __future__ import annotations

import contextvars
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

_MOST_RECORDINGS = 512
_ALIGNMENT = 256  # bytes: more than any bulk copy wants
_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


@dataclass
class _Address:
    """Stands for a tensor in a copied tensor descriptor."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class _Recorder:
    """What one call launches, in order, and the tensors it launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Callable[..., None], list[Any]]] = []

    def add(self, kernel: JITFunction, grid: tuple[int, ...], compiled, args, options) -> None:
        names = set(kernel.arg_names)
        bound = inspect.signature(kernel.fn).bind(
            *args, **{name: value for name, value in options.items() if name in names}
        )
        bound.apply_defaults()
        run = compiled[(*grid, 1, 1)[:3]]
        self.launches.append((run, list(bound.arguments.values())))


class _Kernel:
    """A compiled-on-demand kernel whose launches can be recorded; used as the kernel itself is."""

    def __init__(self, kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        recorder = _recorder.get()
        if recorder is None:
            direct: Callable[..., Any] = self._kernel[grid]
            return direct

        def launch(*args, **options):
            compiled = self._kernel[grid](*args, **options)
            recorder.add(self._kernel, grid, compiled, args, options)
            return compiled

        return launch


def recordable(kernel) -> _Kernel:
    """Decorates a ``triton.jit`` or ``gluon.jit`` kernel that a ``replayed`` function launches."""
    return _Kernel(kernel)


class _Recording:
    """The launches of one call, with numbers in place of its tensors.

    Slots are numbered: the given tensors, the returned one, then each temporary.
    """

    def __init__(self, given: tuple[Tensor, ...], out: Tensor, recorder: _Recorder) -> None:
        self._out_shape, self._out_dtype = out.shape, out.dtype
        self._slots = {tensor.data_ptr(): i for i, tensor in enumerate((*given, out))}
        self._offsets: list[int] = []
        self._bytes = 0
        self._launches = []
        for run, args in recorder.launches:
            pointers, descriptors = [], []
            for place, arg in enumerate(args):
                if isinstance(arg, Tensor):
                    pointers.append((place, self._slot(arg)))
                    args[place] = None
                elif hasattr(arg, "block_shape"):
                    fields = {**vars(arg), "base": None}
                    descriptors.append((place, self._slot(arg.base), type(arg), fields))
                    args[place] = None
            self._launches.append((run, args, pointers, descriptors))

    def _slot(self, tensor: Tensor) -> int:
        address = tensor.data_ptr()
        if address not in self._slots:
            assert tensor.storage_offset() == 0, "a temporary tensor must not share its memory"
            self._slots[address] = len(self._slots)
            self._offsets.append(self._bytes)
            size = tensor.untyped_storage().nbytes()
            self._bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._slots[address]

    def replay(self, device: torch.device, addresses: list[int]) -> Tensor:
        """Launch everything with the given tensors' addresses, which it appends to."""
        out = torch.empty(self._out_shape, dtype=self._out_dtype, device=device)
        scratch = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        base = scratch.data_ptr()
        addresses.append(out.data_ptr())
        addresses += [base + offset for offset in self._offsets]
        stream = current_stream(device)
        for run, constants, pointers, descriptors in self._launches:
            args = constants.copy()
            for place, slot in pointers:
                args[place] = addresses[slot]
            for place, slot, kind, fields in descriptors:
                descriptor = object.__new__(kind)
                descriptor.__dict__ = {**fields, "base": _Address(addresses[slot])}
                args[place] = descriptor
            run(*args, stream=stream)
        return out


def current_stream(device: torch.device) -> int:
    """The raw handle of the current stream."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


class Replayed:
    """A function of tensors that launches ``recordable`` kernels alone, recorded for each shape.

    The function takes tensors, then other hashable arguments, and returns a new tensor. What it
    launches may depend on nothing but its tensors' shapes, strides and types and these arguments.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()

    def __call__(self, given: tuple[Tensor, ...], *rest) -> Tensor:
        device = given[0].device
        addresses = [tensor.data_ptr() for tensor in given]
        if device.type != "cuda" or any(address % 16 for address in addresses):
            return self._function(*given, *rest)
        key = (device, rest, *[(t.shape, t.stride(), t.dtype) for t in given])
        recording = self._recordings.get(key)
        if recording is None:
            return self._record(key, given, rest)
        return recording.replay(device, addresses)

    def _record(
        self, key: tuple[Any, ...], given: tuple[Tensor, ...], rest: tuple[Any, ...]
    ) -> Tensor:
        recorder = _Recorder()
        token = _recorder.set(recorder)
        try:
            out = self._function(*given, *rest)
        finally:
            _recorder.reset(token)
        if len({tensor.data_ptr() for tensor in (*given, out)}) == len(given) + 1:
            self._recordings[key] = _Recording(given, out, recorder)
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        return out
