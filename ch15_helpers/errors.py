"""Typed errors. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class Ch15Error(Exception):
    """Base of every error that this package raises on purpose."""


class ModelLoadError(Ch15Error):
    """Weights, configuration or tokenizer cannot be read; names the file and the tensor."""


class InvalidRequestError(Ch15Error, ValueError):
    """A request or one of its sampling parameters makes no sense."""


class CapacityError(Ch15Error):
    """More KV blocks are needed than there are.

    Attributes:
        blocks_needed: blocks that the operation needs.
        blocks_total: blocks that the pool has (or has free, as the message says).
    """

    def __init__(self, message: str, blocks_needed: int = 0, blocks_total: int = 0) -> None:
        super().__init__(message)
        self.blocks_needed = blocks_needed
        self.blocks_total = blocks_total


class UnknownTargetError(Ch15Error, KeyError):
    """A target, profile, device or parameter name that does not exist; lists the valid ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ExpectationsError(Ch15Error):
    """An expectations file is malformed; names the file and the field."""


class HardwareError(Ch15Error):
    """The device that was asked for is not there or cannot do what was asked."""


class NotebookError(Ch15Error):
    """A notebook failed to execute; names the notebook, the cell and the error."""


class WorkloadError(Ch15Error, ValueError):
    """A trace or a workload makes no sense; for a file, names it and the line."""


class NoReplicaError(Ch15Error):
    """No replica is alive that could take a request; says what became of them."""


class ReplicaError(Ch15Error):
    """Replica processes could not be started or do not keep to the protocol."""


class TierError(Ch15Error):
    """A KV tier cannot be built as asked; once it runs, its failures are misses, not errors."""


class TransportError(Ch15Error):
    """A KV transport is set up or used wrongly, or its connection is gone; says which and why."""


class MoEError(Ch15Error, ValueError):
    """A routing, placement or set-up of expert parallelism makes no sense; says which and why."""


class DeviceLostError(Ch15Error):
    """The device stopped working; nothing can run on it until the process is started again."""


class EngineConfigError(Ch15Error, ValueError):
    """Two settings of an engine, or a setting and its class, exclude each other; says which."""


class PlacementError(Ch15Error, ValueError):
    """A topology, a cut of a model or a load makes no sense, or no plan is feasible; says why."""
