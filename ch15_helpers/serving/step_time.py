"""How long a step takes: a linear model of what the step does, fitted to measured steps.

The terms are those of Vidur (Agrawal et al., MLSys 2024), cut down to what can be counted without
a tensor. Matrix products are not linear in their rows (the tokens of a step), so two terms bend
the line: a CPU's first rows cost more each than later ones, and a GPU's first rows cost nothing
beside reading the weights. The fit minimises the *relative* error, as a decode step of 5 ms
matters as much as a prompt of 500 ms, and no coefficient is negative, so the model extrapolates to
more work as more time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ch15_helpers.serving.step import Step

Floats = npt.NDArray[np.float64]

FEW_ROWS = 16
"""Tokens of a step that ``few_row_s`` counts at most."""
MANY_ROWS = 256
"""Tokens of a step beyond which ``many_row_s`` counts."""


class StepFeatures(NamedTuple):
    """What a step computes.

    Attributes:
        prefill_tokens: tokens in prompt chunks.
        prefill_pairs: (query, key) pairs that their attention visits.
        num_chunks: prompt chunks.
        num_decodes: sequences that decode.
        decode_context: tokens that the decodes read from the KV cache, the new one included.
        moved_blocks: KV blocks swapped or copied before the step.
    """

    prefill_tokens: int
    prefill_pairs: int
    num_chunks: int
    num_decodes: int
    decode_context: int
    moved_blocks: int


def prompt_features(step: Step) -> tuple[int, int, int]:
    """(prefill_tokens, prefill_pairs, num_chunks) of a step."""
    tokens = pairs = 0
    for chunk in step.chunks:
        count = chunk.num_tokens
        tokens += count
        pairs += count * chunk.start + count * (count + 1) // 2
    return tokens, pairs, len(step.chunks)


def features_of(step: Step, *, updated: bool) -> StepFeatures:
    """Count what a step computes.

    Args:
        updated: whether ``Scheduler.update`` has been told about the step, as in an engine's
            ``on_step``. It counts the token that was computed.
    """
    context = sum(request.num_computed_tokens for request in step.decodes)
    if not updated:
        context += len(step.decodes)
    moved = len(step.swap_out) + len(step.swap_in) + len(step.copies)
    return StepFeatures(*prompt_features(step), len(step.decodes), context, moved)


@dataclass(frozen=True)
class FitReport:
    """How well a model fits the steps it was fitted on, or others.

    Relative error is (model - measured) / measured.

    Attributes:
        num_steps: steps looked at.
        median_abs, p90_abs: of the absolute relative error.
        bias: median of the signed relative error.
        total: signed relative error of the sum of all step times.
    """

    num_steps: int
    median_abs: float
    p90_abs: float
    bias: float
    total: float


@dataclass(frozen=True)
class StepTimeModel:
    """Seconds a step takes: ``constant_s`` plus one coefficient (s) for each of StepFeatures.

    Attributes:
        few_row_s, many_row_s: for each token of a step, prompt and decode alike, up to FEW_ROWS
            and beyond MANY_ROWS.
        fitted_on: hardware, model and workload in words; it labels every simulated result.
    """

    constant_s: float
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    chunk_s: float = 0.0
    decode_s: float = 0.0
    context_token_s: float = 0.0
    moved_block_s: float = 0.0
    few_row_s: float = 0.0
    many_row_s: float = 0.0
    fitted_on: str = "given by hand"

    def __post_init__(self) -> None:
        for name, value in zip(_COEFFICIENTS, self.coefficients, strict=True):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite time of at least 0 s, got {value}")
        if not max(self.coefficients) > 0:
            raise ValueError("all coefficients are 0; a step must take time")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """All of them, the constant first."""
        return tuple(getattr(self, name) for name in _COEFFICIENTS)

    def step_s(self, features: StepFeatures) -> float:
        """Duration of a step."""
        tokens, pairs, chunks, decodes, context, moved = features
        return (
            self._base_s(tokens + decodes, decodes)
            + self.context_token_s * context
            + self.prefill_token_s * tokens
            + self.prefill_pair_s * pairs
            + self.chunk_s * chunks
            + self.moved_block_s * moved
        )

    def decode_base_s(self, num_decodes: int) -> float:
        """A step of decodes alone, without its context: plus ``context_token_s`` times that it is
        ``step_s``, bit for bit (the other terms would add 0.0).
        """
        return self._base_s(num_decodes, num_decodes)

    def decode_step_s(self, num_decodes: int, context: int) -> float:
        """``step_s`` of a step of decodes alone."""
        return self.decode_base_s(num_decodes) + self.context_token_s * context

    def _base_s(self, rows: int, decodes: int) -> float:
        return (
            self.constant_s
            + self.few_row_s * min(rows, FEW_ROWS)
            + self.many_row_s * max(0, rows - MANY_ROWS)
            + self.decode_s * decodes
        )

    def estimates(self, num_decodes: int = 0, context: int = 0) -> dict[str, float]:
        """``token_s`` and ``step_s`` for the LeastSlack policy, at a typical decode batch."""
        return {
            "token_s": self.prefill_token_s + self.many_row_s,
            "step_s": self.decode_step_s(num_decodes, context),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``from_dict`` is the inverse, without loss."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepTimeModel:
        """Inverse of ``to_dict``. Raises ValueError for unknown or missing fields."""
        known = {*_COEFFICIENTS, "fitted_on"}
        if unknown := set(values) - known:
            raise ValueError(f"unknown fields {sorted(unknown)}; a step-time model has {known}")
        if "constant_s" not in values:
            raise ValueError("constant_s is missing")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> StepTimeModel:
        """Inverse of ``to_json``."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def fit(
        cls, features: Sequence[StepFeatures], seconds: Sequence[float], fitted_on: str
    ) -> StepTimeModel:
        """Least squares on the relative error, all coefficients at least 0.

        Raises:
            ValueError: no steps, lengths that differ, or a duration that is not positive.
        """
        if not features or len(features) != len(seconds):
            raise ValueError(f"{len(features)} steps came with {len(seconds)} durations")
        measured = np.asarray(seconds, dtype=np.float64)
        if not np.all(measured > 0):
            raise ValueError("every duration must be positive")
        solution = _non_negative(_counts(features) / measured[:, None])
        named = dict(zip(_COEFFICIENTS, solution, strict=True))
        return cls.from_dict({**named, "fitted_on": fitted_on})

    def report(self, features: Sequence[StepFeatures], seconds: Sequence[float]) -> FitReport:
        """Compare with measured steps."""
        measured = np.asarray(seconds, dtype=np.float64)
        modelled = np.array([self.step_s(each) for each in features])
        errors = modelled / measured - 1
        return FitReport(
            num_steps=len(measured),
            median_abs=float(np.median(np.abs(errors))),
            p90_abs=float(np.percentile(np.abs(errors), 90)),
            bias=float(np.median(errors)),
            total=float(modelled.sum() / measured.sum() - 1),
        )


_COEFFICIENTS = (
    "constant_s",
    "prefill_token_s",
    "prefill_pair_s",
    "chunk_s",
    "decode_s",
    "context_token_s",
    "moved_block_s",
    "few_row_s",
    "many_row_s",
)


def _counts(features: Sequence[StepFeatures]) -> Floats:
    """What each coefficient multiplies: [steps, coefficients]."""
    counts = np.asarray(features, dtype=np.float64)
    rows = counts[:, 0] + counts[:, 3]
    few, many = np.minimum(rows, FEW_ROWS), np.maximum(0, rows - MANY_ROWS)
    return np.column_stack([np.ones(len(counts)), counts, few, many])


def _non_negative(rows: Floats) -> list[float]:
    """The x >= 0 that minimises |rows @ x - 1|.

    At the optimum the positive coefficients are the least-squares solution over their columns
    alone (KKT), so with nine columns the best feasible one of all 511 subsets is it, exactly.
    """
    norms = np.linalg.norm(rows, axis=0)
    used = [int(column) for column in np.flatnonzero(norms)]
    scaled = rows[:, used] / norms[used]
    gram, target = scaled.T @ scaled, scaled.sum(axis=0)
    best, best_gain = np.zeros(len(used)), 0.0
    for size in range(1, len(used) + 1):
        for subset in itertools.combinations(range(len(used)), size):
            chosen = np.array(subset)
            values = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], target[chosen], rcond=None)[0]
            gain = float(target[chosen] @ values)  # by how much the squared error falls
            if np.all(values >= 0) and gain > best_gain * (1 + 1e-12):
                best, best_gain = np.zeros(len(used)), gain
                best[chosen] = values
    solution = np.zeros(rows.shape[1])
    solution[used] = best / norms[used]
    return [float(value) for value in solution]
