"""Readers for public request traces. What does not fit the format is an error with its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from ch15_helpers.errors import WorkloadError
from ch15_helpers.serving.workload import Segment, Workload, WorkloadRequest

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_BLOCK = 512
"""Prompt tokens that one entry of ``hash_ids`` stands for."""


def read_azure_csv(path: str | Path, limit: int | None = None) -> Workload:
    """Azure LLM inference trace: ``TIMESTAMP,ContextTokens,GeneratedTokens``.

    Args:
        path: for example AzureLLMInferenceTrace_conv.csv of Azure/AzurePublicDataset.
        limit: read at most this many requests.

    Raises:
        WorkloadError: a malformed row; the message has file and line.
    """
    path = Path(path)
    requests: list[WorkloadRequest] = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = _csv_rows(path, file)
        _, header = next(rows, (1, []))
        if tuple(header) != AZURE_COLUMNS:
            raise _error(path, 1, f"the header is {header}, expected {list(AZURE_COLUMNS)}")
        origin: tuple[datetime, float] | None = None
        for line, row in rows:
            if limit is not None and len(requests) >= limit:
                break
            if len(row) != len(AZURE_COLUMNS):
                raise _error(path, line, f"{len(row)} fields, expected {len(AZURE_COLUMNS)}")
            moment = _moment(path, line, row[0])
            origin = origin or moment
            # Whole seconds and fraction apart: a float of the date would lose the last digits.
            elapsed_s = (moment[0] - origin[0]).total_seconds() + (moment[1] - origin[1])
            requests.append(
                _request(
                    path,
                    line,
                    elapsed_s,
                    _count(path, line, "ContextTokens", row[1]),
                    _count(path, line, "GeneratedTokens", row[2]),
                    requests,
                )
            )
    return _workload(path, requests)


def read_mooncake_jsonl(path: str | Path, limit: int | None = None) -> Workload:
    """Mooncake trace: one object a line with timestamp (ms), lengths and prefix block hashes.

    Equal ``hash_ids`` are equal blocks of 512 prompt tokens (kvcache-ai/Mooncake, FAST'25).

    Raises:
        WorkloadError: a malformed row; the message has file and line.
    """
    path = Path(path)
    requests: list[WorkloadRequest] = []
    origin_ms: int | None = None
    for line, row in _json_lines(path):
        if limit is not None and len(requests) >= limit:
            break
        timestamp_ms, prompt, output = (
            _count(path, line, key, row.get(key), least)
            for key, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1))
        )
        names = row.get("hash_ids")
        wanted = -(-prompt // MOONCAKE_BLOCK)
        if not isinstance(names, list) or not all(type(n) is int and n >= 0 for n in names):
            raise _error(path, line, f"hash_ids is {names!r}, expected a list of whole numbers")
        if len(names) != wanted:
            raise _error(path, line, f"{len(names)} hash_ids, {prompt} tokens have {wanted}")
        origin_ms = timestamp_ms if origin_ms is None else origin_ms
        segments: tuple[Segment, ...] = tuple((name, MOONCAKE_BLOCK) for name in names[:-1])
        segments += ((names[-1], prompt - MOONCAKE_BLOCK * (wanted - 1)),)
        elapsed_s = (timestamp_ms - origin_ms) / 1000
        requests.append(_request(path, line, elapsed_s, prompt, output, requests, segments))
    return _workload(path, requests)


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every row."""
    rows = csv.reader(file)
    line = 0
    try:
        for row in rows:
            line = rows.line_num
            yield line, row
    except (csv.Error, UnicodeDecodeError) as error:  # a field without end; not a text file
        raise _error(path, line + 1, f"not CSV in UTF-8: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # bad JSON, bytes that are not UTF-8
                raise _error(path, line, f"not JSON: {error}") from error
            if not isinstance(row, dict):
                raise _error(path, line, f"a {type(row).__name__}, expected an object")
            yield line, row


def _moment(path: Path, line: int, text: str) -> tuple[datetime, float]:
    """Date to the second, and the fraction with all its digits."""
    whole, dot, fraction = text.partition(".")
    try:
        if dot and not fraction.isdecimal():
            raise ValueError(text)
        return datetime.strptime(whole, "%Y-%m-%d %H:%M:%S"), float(f"0.{fraction or 0}")
    except ValueError as error:
        raise _error(
            path, line, f"TIMESTAMP is {text!r}, expected 2023-11-16 18:15:46.6805900"
        ) from error


def _count(path: Path, line: int, name: str, value: object, least: int = 1) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not int or value < least:
        raise _error(path, line, f"{name} is {value!r}, expected a whole number from {least}")
    return value


def _request(
    path: Path,
    line: int,
    arrival_s: float,
    prompt: int,
    output: int,
    earlier: list[WorkloadRequest],
    segments: tuple[Segment, ...] = (),
) -> WorkloadRequest:
    if earlier and arrival_s < earlier[-1].arrival_s:
        raise _error(path, line, "the time is before the previous row's; sort the file by time")
    return WorkloadRequest(arrival_s, prompt, output, segments)


def _workload(path: Path, requests: list[WorkloadRequest]) -> Workload:
    if not requests:
        raise WorkloadError(f"{path}: no requests")
    return Workload(path.stem, tuple(requests))


def _error(path: Path, line: int, problem: str) -> WorkloadError:
    return WorkloadError(f"{path}:{line}: {problem}")
