"""The ids that a step sampled: kept on the device for the next step, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ch15_helpers.serving.request import Request


@dataclass(frozen=True, slots=True)
class Launched:
    """Token ids of a step that may still run, one for each request of ``step.sampled``.

    Attributes:
        ids: int64 on the host; valid once ``done`` has happened (None: already).
    """

    ids: Tensor
    done: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """Wait for the step alone, not for what was launched after it."""
        if self.done is not None:
            self.done.synchronize()
        tokens: list[int] = self.ids.tolist()
        return tokens


def fill_in(token_ids: Tensor, last: Tensor) -> Tensor:
    """Replace ``-1 - row`` by what was sampled in that row of the last step, on the device.

    A row whose logits were not finite has INVALID_TOKEN: any id does, as its request ends.
    """
    rows = (-1 - token_ids).clamp_min(0)
    return torch.where(token_ids < 0, last.index_select(0, rows).clamp_min(0), token_ids)


class LastIds:
    """What the last step sampled.

    Attributes:
        ids: int64 [max_num_seqs] on the device; captured steps read and write it.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        # Two steps may be in flight, and the ids of the older one not read yet.
        self._host = [torch.zeros_like(self.ids, device="cpu", pin_memory=on_gpu) for _ in "ab"]
        self._sampled: list[Request] = []

    def remember(self, sampled: list[Request], ids: Tensor) -> Launched:
        """Keep the ids of a step's sampled requests and start their copy to the host.

        Args:
            sampled: never changed in place.
            ids: int64 [len(sampled)] on the device, possibly ``self.ids`` itself.
        """
        self._sampled = sampled
        count = len(sampled)
        if not ids.is_cuda:
            self.ids = ids
            return Launched(ids, None)
        if ids.data_ptr() != self.ids.data_ptr():
            self.ids[:count].copy_(ids)
        host = self._host[0][:count]
        self._host.reverse()
        host.copy_(ids, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Launched(host, done)

    def rows(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """The row of ``ids`` that each request has; 0 for one that the last step did not sample."""
        if requests is self._sampled:
            return np.arange(len(requests), dtype=np.int64)
        row_of = {request: row for row, request in enumerate(self._sampled)}
        return np.array([row_of.get(request, 0) for request in requests], dtype=np.int64)
