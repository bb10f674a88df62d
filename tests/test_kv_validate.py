"""``ch15 validate kv_cache_management``: passes where the bound holds, names the step where not."""

from __future__ import annotations

import re

import pytest

from ch15_helpers.bench.targets import TARGETS, validator_of
from ch15_helpers.bench.validate_kv import (
    Conversations,
    DecodeStep,
    Observed,
    _judge,
    validate_decode_latency,
)

LOAD = Conversations(count=5, turns=3, message_tokens=20, answer_tokens=6)


def test_a_budget_that_holds() -> None:
    outcome = validate_decode_latency("random:TINY", "cpu", budget_s=60.0, load=LOAD)
    assert outcome.passed, outcome.report
    each = r"(\w+): p99 [\d.]+ ms over \d+ steps, evicted [1-9]\d* blocks, promoted [1-9]\d* tokens"
    assert re.findall(each, outcome.report) == ["lru", "lfu", "cost_aware"]
    assert "as given" in outcome.report


def test_a_budget_that_no_step_can_keep_names_the_step() -> None:
    outcome = validate_decode_latency("random:TINY", "cpu", budget_s=1e-9, load=LOAD)
    assert not outcome.passed
    assert re.search(r"over the budget at step \d+: [\d.]+ ms, \d+ decodes", outcome.report)


def test_the_derived_budget_is_stated_with_what_it_comes_from() -> None:
    report = validate_decode_latency("random:TINY", "cpu", load=LOAD).report
    assert re.search(
        r"a decode step: [\d.]+ ms = 1.5 x [\d.]+ ms \(p99 without eviction, \d+ st", report
    )


def observed(seconds: float = 1.0, tokens: int = 1, promoted: int = 5) -> Observed:
    steps = [DecodeStep(7, seconds, 2, 1, 0)]
    return Observed(steps, [[tokens]], evicted=3, promoted_tokens=promoted)


@pytest.mark.parametrize(
    ("small", "fault"),
    [
        (observed(), ""),
        (observed(seconds=2.1), "over the budget at step 7: 2100.00 ms"),
        (observed(tokens=2), "tokens differ"),
        (observed(promoted=0), "nothing was tested"),
    ],
)
def test_each_way_to_fail(small: Observed, fault: str) -> None:
    outcome = _judge("lru", observed(), small, 2.0)
    assert outcome.passed == (not fault) and fault in outcome.report
    assert outcome.report.startswith("lru: p99 ")


def test_the_target_has_it() -> None:
    assert validator_of(TARGETS["kv_cache_management"], TARGETS) is validate_decode_latency
