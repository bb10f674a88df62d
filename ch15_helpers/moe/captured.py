"""A layer over many GPUs in one CUDA graph, its collectives included.

With messages of a fixed size (``ExpertParallelConfig.max_tokens``) nothing on the path asks the
host, so all launches of a layer can be recorded once: at a few tokens they take longer than what
they launch. DeepEP's low-latency mode (2025) serves decode that way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ch15_helpers.errors import MoEError

_WARM_UPS = 2  # communicators, kernels and their workspaces must be there before


class CapturedCall:
    """Calls of one shape, replayed. All ranks must make it, and call it, together.

    Bytes on links are counted while it is made, and not by its calls.
    """

    def __init__(self, run: Callable[..., Tensor], *inputs: Tensor) -> None:
        """``run`` takes tensors like ``inputs``, which are copied, and asks the host nothing.

        Raises:
            MoEError: the tensors are not on a GPU.
        """
        device = inputs[0].device
        if device.type != "cuda":
            raise MoEError(
                f"inputs are on {device}; expected a CUDA device, whose graphs these are"
            )
        self._inputs = tuple(part.clone() for part in inputs)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        # The watchdog of the collectives looks at its events from another thread meanwhile.
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self._out = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result, which lives until the next call."""
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        return self.replay()

    def replay(self) -> Tensor:
        """The same with the inputs of the last call."""
        self._graph.replay()
        return self._out
