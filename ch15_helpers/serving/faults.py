"""What a failed step means: an error of this step alone, or a device that is gone."""

from __future__ import annotations

import torch

# A GPU's errors are sticky: after an illegal address every later call fails, too.
_SIGNS = ("CUDA error", "Triton Error [CUDA]", "CUDA driver error")


def device_is_lost(error: BaseException, device: torch.device) -> bool:
    """Whether nothing can be computed on the device any more.

    Running out of memory, and whatever is raised on the host, leaves it as it was. After an error
    of the device itself it is asked.
    """
    if isinstance(error, torch.OutOfMemoryError) or not is_device_error(error):
        return False
    return not device_answers(device)


def is_device_error(error: BaseException) -> bool:
    """Whether the device, or its driver, reported the error."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def device_answers(device: torch.device) -> bool:
    """Whether the device still computes."""
    try:
        return int(torch.ones(1, device=device).sum()) == 1
    except RuntimeError:
        return False
