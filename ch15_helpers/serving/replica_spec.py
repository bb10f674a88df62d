"""What replicas run, and what they answer, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ch15_helpers.errors import ReplicaError
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.request import SamplingParams

Plain = bool | int | float | str | None


@dataclass(frozen=True)
class ReplicaSpec:
    """All replicas are alike. It travels as JSON, so it holds plain values only.

    Attributes:
        model: source for ``load_model``.
        device: ``cpu``, or ``cuda`` for the GPU with the number of the local rank.
        dtype: name of a torch dtype, or ``auto``.
        engine: fields of EngineConfig.
        beat_s: how often a replica gives a sign of life between steps.

    Raises:
        ReplicaError: an unknown device, or a field that EngineConfig does not have.
    """

    model: str = "smollm2"
    device: str = "cpu"
    dtype: str = "float32"
    engine: Mapping[str, Plain] = field(default_factory=dict)
    beat_s: float = 0.5

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ReplicaError(f"device is {self.device!r}; replicas run on 'cpu' or 'cuda'")
        if not self.beat_s > 0:
            raise ReplicaError(f"beat_s must be positive, got {self.beat_s}")
        known = {each.name for each in fields(EngineConfig)}
        if unknown := set(self.engine) - known:
            raise ReplicaError(f"EngineConfig has no {sorted(unknown)}; it has {sorted(known)}")

    def engine_config(self) -> EngineConfig:
        """The configuration of each engine."""
        return EngineConfig(**self.engine)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``from_dict`` is the inverse."""
        return asdict(self) | {"engine": dict(self.engine)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReplicaSpec:
        """Inverse of ``to_dict``."""
        return cls(**values)


@dataclass
class ReplicaOutput:
    """One request and its one answer. Times count from ``submit``, on the router's clock.

    Attributes:
        request_id: number of the request in its pool.
        token_ids, finish_reason, error: as in RequestOutput.
        replica: who has it, and then who answered; -1 when nobody could.
        num_attempts: placements, 1 unless replicas died.
        num_cached_tokens: prompt tokens that the replica had in its cache.
        ttft_s, e2e_s: first token and answer, as the router saw them; None without.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    session: int | None
    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str | None = None
    replica: int = -1
    num_attempts: int = 0
    num_cached_tokens: int = 0
    ttft_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True)
class ReplicaTotals:
    """What a replica has computed since it started, told with each of its answers.

    Attributes:
        steps: engine steps. prompt_tokens: computed, so cached ones are not in it.
        busy_s: time in steps, on the replica's own clock.
    """

    steps: int = 0
    prompt_tokens: int = 0
    busy_s: float = 0.0
