"""Stored expectations: reading, comparing, and the one way of writing them.

``expectations/{key}.json`` holds, for one kind of hardware, what each target recorded when its
numbers were last accepted. Reading never writes. ``update`` is called for
``--update-expectations`` alone; it replaces the file in one step.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ch15_helpers.bench.schema import (
    MODELLED_TOLERANCE,
    Metric,
    SchemaError,
    TargetResult,
    check_hardware,
)
from ch15_helpers.errors import ExpectationsError

SCHEMA_VERSION = 1
Verdict = Literal["ok", "improved", "regressed", "new", "missing"]
# Worst first: a target's verdict is the first of these that one of its metrics has.
SEVERITY: tuple[Verdict, ...] = ("regressed", "missing", "new", "improved", "ok")
PROVENANCE_FIELDS = ("commit", "command", "parameters", "sample_count", "time")
# These do not change what is computed; the device is already part of the hardware key.
INCOMPARABLE_EXEMPT = ("iterations", "warmup", "profile", "out_dir", "device")


@dataclass(frozen=True)
class Provenance:
    """Where a target's expectation comes from; ``time`` is ISO 8601 in UTC."""

    commit: str
    command: str
    parameters: Mapping[str, Any]
    sample_count: int
    time: str


@dataclass(frozen=True)
class TargetExpectation:
    metrics: tuple[Metric, ...]
    provenance: Provenance


@dataclass(frozen=True)
class Expectations:
    """Contents of one expectations file."""

    key: str
    hardware: Mapping[str, Any]
    targets: Mapping[str, TargetExpectation]


@dataclass(frozen=True)
class Comparison:
    """Verdict on one metric.

    Attributes:
        measured, expected: the two sides; one is None for ``new`` and ``missing``.
        reason: why the verdict is not a plain comparison, or the change in percent.
        compared: False where the rule is not to compare (absolute time on a CPU).
    """

    name: str
    verdict: Verdict
    measured: Metric | None
    expected: Metric | None
    reason: str
    compared: bool = True


def expectations_path(directory: Path, key: str) -> Path:
    return directory / f"{key}.json"


def load(path: Path) -> Expectations:
    """Read and check one file.

    Raises:
        ExpectationsError: unreadable, not JSON, or not of this form; names file and field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpectationsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExpectationsError(f"{path}: not valid JSON: {error}") from error
    try:
        return _parse(data, path.stem)
    except SchemaError as error:
        raise ExpectationsError(f"{path}: {error}") from error


def load_key(directory: Path, key: str) -> Expectations | None:
    """Expectations of one hardware key, or None where nothing is stored for it."""
    path = expectations_path(directory, key)
    return load(path) if path.exists() else None


def load_all(directory: Path) -> dict[str, Expectations]:
    """Every stored key: ``cpu`` first, then GPUs by name."""
    paths = sorted(directory.glob("*.json"), key=lambda p: (p.stem != "cpu", p.stem))
    return {path.stem: load(path) for path in paths}


def compare(result: TargetResult, stored: Expectations | None) -> list[Comparison]:
    """Verdicts for a target's metrics, then for stored metrics that it did not record.

    The commit that stored them plays no part. Other parameters make every metric ``new``,
    because a different model or dtype is different work.
    """
    expected = None if stored is None else stored.targets.get(result.target)
    if expected is None:
        reason = f"nothing is stored for {result.target} on {result.key}"
        return [Comparison(m.name, "new", m, None, reason, False) for m in result.metrics]
    difference = parameter_difference(result.parameters, expected.provenance.parameters)
    if difference:
        reason = f"not comparable: {difference}"
        return [Comparison(m.name, "new", m, None, reason, False) for m in result.metrics]
    by_name = {m.name: m for m in expected.metrics}
    on_gpu = result.key != "cpu"
    verdicts = [compare_metric(m, by_name.get(m.name), on_gpu) for m in result.metrics]
    recorded = {m.name for m in result.metrics}
    for name, metric in by_name.items():
        if name not in recorded:
            reason = "stored, but this run did not record it"
            verdicts.append(Comparison(name, "missing", None, metric, reason))
    return verdicts


def compare_metric(measured: Metric, expected: Metric | None, on_gpu: bool) -> Comparison:
    """Verdict on one metric; the tolerance and the direction are the stored ones.

    ``exact``: equal or regressed. ``modelled``: equal to 1e-6, else improved or regressed by
    its direction (regressed where it has none). ``measured``: improved or regressed beyond the
    tolerance; absolute values on CPUs are shown and not compared.
    """

    def verdict(name: Verdict, reason: str = "", compared: bool = True) -> Comparison:
        return Comparison(measured.name, name, measured, expected, reason, compared)

    if expected is None:
        return verdict("new", "not stored yet", False)
    if (measured.kind, measured.unit) != (expected.kind, expected.unit):
        was, now = f"{expected.kind} [{expected.unit}]", f"{measured.kind} [{measured.unit}]"
        return verdict("new", f"not comparable: stored as {was}, recorded as {now}", False)
    if expected.kind == "exact":
        same = _identical(measured.value, expected.value)
        return verdict("ok") if same else verdict("regressed", "exact value changed")
    if expected.kind == "measured" and not (expected.is_ratio or on_gpu):
        return verdict("ok", "absolute values are not compared on CPUs", False)
    now_value, was_value = measured.number, expected.number
    tolerance = expected.tolerance if expected.kind == "measured" else MODELLED_TOLERANCE
    if abs(now_value - was_value) <= tolerance * abs(was_value):
        return verdict("ok", _change(now_value, was_value))
    higher = now_value > was_value
    better = expected.direction == ("higher" if higher else "lower")
    return verdict("improved" if better else "regressed", _change(now_value, was_value))


def overall(comparisons: Iterable[Comparison]) -> Verdict:
    """A target's verdict: the worst of its metrics'; without metrics ``missing``."""
    present = {c.verdict for c in comparisons}
    return next((v for v in SEVERITY if v in present), "missing")


def parameter_difference(now: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Why two runs are not comparable, or an empty string.

    Iterations, profile, output folder and device do not count.
    """
    absent = "(absent)"
    names = [n for n in sorted({*now, *stored}) if n not in INCOMPARABLE_EXEMPT]
    differences = [
        f"{n} is {now.get(n, absent)!r}, stored with {stored.get(n, absent)!r}"
        for n in names
        if not _identical(_plain(now.get(n, absent)), _plain(stored.get(n, absent)))
    ]
    return "; ".join(differences)


def update(
    directory: Path, results: Iterable[TargetResult], *, commit: str, command: str, time: str
) -> list[Path]:
    """Store results as the new expectations; other targets in the files stay.

    Args:
        results: of targets that ran without an error.
        commit, command, time: provenance.

    Returns:
        Files written, each replaced in one step.

    Raises:
        ExpectationsError: an existing file is malformed (nothing is written), or a result says
            that its tokens differ, which is never an expectation.
    """
    by_key: dict[str, list[TargetResult]] = {}
    for result in results:
        if not result.tokens_agree:
            raise ExpectationsError(
                f"target {result.target}: the optimised tokens differ from the baseline's; "
                "a wrong result is not stored as an expectation"
            )
        by_key.setdefault(result.key, []).append(result)
    contents = {}
    for key, group in by_key.items():
        stored = load_key(directory, key)
        targets = dict(stored.targets) if stored else {}
        for r in group:
            origin = Provenance(commit, command, r.parameters, r.sample_count, time)
            targets[r.target] = TargetExpectation(r.metrics, origin)
        contents[expectations_path(directory, key)] = Expectations(key, group[-1].hardware, targets)
    for path, expectations in contents.items():
        write_json_atomically(path, _to_dict(expectations))
    return list(contents)


def write_json_atomically(path: Path, data: object) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _parse(data: object, key: str) -> Expectations:
    top = _fields(data, "file", ("schema_version", "hardware", "targets"))
    if top["schema_version"] != SCHEMA_VERSION or isinstance(top["schema_version"], bool):
        raise SchemaError(
            f"schema_version is {top['schema_version']!r}; this version reads {SCHEMA_VERSION}"
        )
    if not isinstance(top["targets"], dict):
        raise SchemaError("targets must be an object of target names")
    targets = {}
    for name, entry in top["targets"].items():
        try:
            targets[name] = _parse_target(entry)
        except SchemaError as error:
            raise SchemaError(f"targets.{name}: {error}") from error
    return Expectations(key, check_hardware(top["hardware"]), targets)


def _parse_target(entry: object) -> TargetExpectation:
    fields = _fields(entry, "target", ("metrics", "provenance"))
    if not isinstance(fields["metrics"], list) or not fields["metrics"]:
        raise SchemaError("metrics must be a list with at least one metric")
    metrics = tuple(Metric.from_dict(m) for m in fields["metrics"])
    names = [m.name for m in metrics]
    if len(set(names)) != len(names):
        raise SchemaError("metrics holds the same name twice")
    p = _fields(fields["provenance"], "provenance", PROVENANCE_FIELDS)
    for name in ("commit", "command", "time"):
        if not isinstance(p[name], str) or not p[name]:
            raise SchemaError(f"provenance: {name} must be a non-empty string")
    if not isinstance(p["parameters"], dict):
        raise SchemaError("provenance: parameters must be an object")
    count = p["sample_count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise SchemaError("provenance: sample_count must be a whole number ≥ 0")
    return TargetExpectation(metrics, Provenance(**p))


def _fields(data: object, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SchemaError(f"{what} must be an object, not {type(data).__name__}")
    wrong = [f"no field {n!r}" for n in names if n not in data]
    wrong += [f"unknown field {n!r}" for n in data if n not in names]
    if wrong:
        raise SchemaError(f"{what}: {', '.join(wrong)}; expected {', '.join(names)}")
    return data


def _to_dict(e: Expectations) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "hardware": dict(e.hardware),
        "targets": {
            name: {
                "metrics": [m.to_dict() for m in target.metrics],
                "provenance": {n: getattr(target.provenance, n) for n in PROVENANCE_FIELDS},
            }
            for name, target in sorted(e.targets.items())
        },
    }


def _identical(a: object, b: object) -> bool:
    """Equal, where True is not 1 (JSON keeps them apart)."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _change(now: float, was: float) -> str:
    return f"{(now - was) / abs(was):+.1%}" if was else f"{was:g} → {now:g}"
