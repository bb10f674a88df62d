"""Step-time models that were fitted on real hardware and are stored with the package.

Whoever simulates with them gets the same numbers on every machine. Each file says on what, when
and how it was fitted, and how far the simulator was from the engine on workloads that the fit did
not see. ``python -m ch15_helpers.bench.fit_step_time --write`` is the only writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from ch15_helpers.errors import Ch15Error
from ch15_helpers.serving.step_time import StepTimeModel

SCHEMA_VERSION = 1
PREFIX = "step_time_"
_FIELDS = frozenset({"schema_version", "key", "step_time", "fit", "held_out", "provenance"})


@dataclass(frozen=True)
class StoredStepTime:
    """One fitted model and where it comes from.

    Attributes:
        key: hardware key, ``cpu`` or a GPU's slug.
        model: the coefficients; ``model.fitted_on`` labels what is simulated with them.
        fit: residuals on the steps of the fit, the fields of ``FitReport``.
        held_out: one mapping for each workload that was not fitted on: its name, the relative
            errors of the median TTFT and TPOT, and the residuals of its steps.
        provenance: hardware, versions, model, dtype, threads, clock, limits, commit, command, time.
    """

    key: str
    model: StepTimeModel
    fit: Mapping[str, float]
    held_out: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any]

    @property
    def worst(self) -> float:
        """Largest absolute error of a median TTFT or TPOT on the held-out workloads."""
        names = ("ttft_p50_error", "tpot_p50_error")
        return max(abs(float(each[name])) for each in self.held_out for name in names)

    def describe(self) -> str:
        """One line: what simulated numbers stand on."""
        return (
            f"step times of {self.model.fitted_on}; on workloads that were not fitted on, the "
            f"simulated medians were at most {self.worst:.1%} off"
        )

    def to_dict(self) -> dict[str, Any]:
        """As stored; ``from_dict`` is the inverse."""
        return {
            "schema_version": SCHEMA_VERSION,
            "key": self.key,
            "step_time": self.model.to_dict(),
            "fit": dict(self.fit),
            "held_out": [dict(each) for each in self.held_out],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "a step-time file"
    ) -> StoredStepTime:
        """Inverse of ``to_dict``. Raises Ch15Error that names ``source`` and what is wrong."""
        if set(values) != _FIELDS or values["schema_version"] != SCHEMA_VERSION:
            raise Ch15Error(
                f"{source}: expected schema_version {SCHEMA_VERSION} and the fields "
                f"{', '.join(sorted(_FIELDS))}; fit it again with "
                "`python -m ch15_helpers.bench.fit_step_time --write`"
            )
        if not values["held_out"]:
            raise Ch15Error(f"{source}: held_out is empty; a fit is stored with its error")
        try:
            model = StepTimeModel.from_dict(values["step_time"])
        except (TypeError, ValueError) as error:
            raise Ch15Error(f"{source}: step_time: {error}") from error
        return cls(
            key=values["key"],
            model=model,
            fit=values["fit"],
            held_out=tuple(values["held_out"]),
            provenance=values["provenance"],
        )


def file_name(key: str) -> str:
    """Name of the file of one hardware key."""
    return f"{PREFIX}{key}.json"


def stored_keys() -> tuple[str, ...]:
    """Hardware keys that a fit is stored for, ``cpu`` first."""
    names = (each.name for each in _folder().iterdir())
    keys = [n[len(PREFIX) : -5] for n in names if n.startswith(PREFIX) and n.endswith(".json")]
    return tuple(sorted(keys, key=lambda key: (key != "cpu", key)))


def load_step_time(key: str = "cpu") -> StoredStepTime:
    """The stored fit of one hardware key.

    Raises:
        Ch15Error: none is stored, and which are; or the file is malformed.
    """
    if key not in stored_keys():
        raise Ch15Error(
            f"no step times are stored for {key!r}; stored: {', '.join(stored_keys())}. Fit them "
            "there with `python -m ch15_helpers.bench.fit_step_time --write`"
        )
    text = (_folder() / file_name(key)).read_text(encoding="utf-8")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise Ch15Error(f"{file_name(key)} is not JSON: {error}") from error
    return StoredStepTime.from_dict(values, file_name(key))


def _folder() -> Traversable:
    return files("ch15_helpers.serving") / "data"
