"""The comparison with transformers: fair rows, honest verdicts; transformers itself is not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ch15_helpers.bench import peers
from ch15_helpers.bench.peers import BEST, PeerRow, Side, Workload
from ch15_helpers.bench.timing import Samples, pair_from_samples
from ch15_helpers.model.transformer import Transformer

WORK = Workload("decode, batch 2", [[1, 2], [3, 4]], 4)


class Log:
    """Sides that note when they run and give fixed ids."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def side(self, dtype: str, layout: str, first_id: int = 0) -> Side:
        name = f"{dtype} {layout}".strip()

        def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
            self.calls.append(name)
            return [[first_id + n for n in range(out)] for _ in prompts]

        return Side(dtype, layout, generate)


def clock(times: dict[str, float]) -> Callable[..., dict[str, Samples]]:
    """Stands for ``interleave``: the n-th version took ``times`` in the same order."""

    def interleave(versions: dict[str, object], **_: object) -> dict[str, Samples]:
        return {
            name: Samples((seconds,))
            for name, seconds in zip(versions, times.values(), strict=True)
        }

    return interleave


def test_every_side_runs_in_every_round() -> None:
    log = Log()
    theirs = [log.side("float32", "")]
    ours = [log.side("float32", "rows"), log.side("float32", "panels", 7)]
    rows = list(peers.compare(WORK, ours, theirs, rounds=3))
    order = ["float32", "float32 rows", "float32 panels"]
    assert log.calls == order * (1 + 1 + 3)  # ids, warm-up, rounds
    assert [row.same_tokens for row in rows[:2]] == [1.0, 0.0]


def test_like_against_like_and_the_best_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    theirs = [log.side("float32", ""), log.side("bfloat16", "", 1)]
    ours = [
        log.side("float32", "rows"),
        log.side("float32", "panels"),
        log.side("bfloat16", "onednn", 1),
    ]
    times = {"f": 6.0, "b": 4.0, "rows": 3.0, "panels": 2.0, "onednn": 1.0}
    monkeypatch.setattr(peers, "interleave", clock(times))
    rows = list(peers.compare(WORK, ours, theirs, rounds=1))
    found = [(row.kind, row.theirs.dtype, row.ours.layout, row.timing.speedup) for row in rows]
    assert found == [
        ("float32", "float32", "rows", 2.0),
        ("float32", "float32", "panels", 3.0),
        ("bfloat16", "bfloat16", "onednn", 4.0),
        (BEST, "bfloat16", "panels", 2.0),  # exact tokens against their fastest dtype
    ]
    assert all(row.same_tokens == 1.0 for row in rows)
    assert peers.problems(rows) == []


def make_row(speedup: float, same: float, dtype: str = "float32", kind: str = "") -> PeerRow:
    side = Log().side(dtype, "rows")
    timing = pair_from_samples(Samples((speedup,)), Samples((1.0,)))
    return PeerRow(WORK, side, side, timing, same, kind or dtype)


def test_problems() -> None:
    good = make_row(2.0, 1.0)
    assert peers.problems([good, make_row(0.9, 1.0)]) == []  # another layout is ahead
    assert peers.problems([make_row(0.9, 1.0)]) == ["decode, batch 2, float32: not ahead"]
    assert peers.problems([good, make_row(1.5, 0.5)]) == [
        "decode, batch 2, float32: 50% same tokens"
    ]
    assert peers.problems([good, make_row(1.5, 0.5, "bfloat16")]) == []
    assert peers.problems([good, make_row(1.0, 1.0, kind=BEST)]) == [
        "decode, batch 2, best: not ahead"
    ]
    assert len(peers.problems([make_row(1.5, 0.1, "bfloat16")])) == 1


def test_workloads(smollm2: Transformer) -> None:
    assert smollm2.tokenizer is not None
    found = peers.workloads(smollm2.tokenizer, [1, 32], 512)
    assert [(w.name, len(w.prompts), w.tokens) for w in found] == [
        ("decode, batch 1", 1, 64),
        ("decode, batch 32", 32, 2048),
        ("prefill, 512 tokens", 1, 512),
    ]
    assert len({tuple(prompt) for prompt in found[1].prompts}) == 32
    assert {len(prompt) for prompt in found[1].prompts} == {16}


def test_agreement_counts_positions() -> None:
    assert peers.agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.75
    with pytest.raises(ValueError, match="zip"):
        peers.agreement([[1]], [[1, 2]])


def test_one_new_token_counts_the_prompt() -> None:
    assert replace(WORK, new_tokens=1).tokens == 4
    assert WORK.tokens == 8
