"""Eviction policies against definitions that search a list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers.kv.policies import EVICTION_POLICIES, HeapPolicy, make_eviction_policy


@dataclass
class Seen:
    """What a definition may look at."""

    inserted: int
    used: int
    gain: float
    uses: int = 0
    age: float = 0.0
    pinned: bool = False


def least(name: str, seen: dict[int, Seen]) -> int | None:
    """The victim by definition; None when there is none."""
    free = {key: s for key, s in seen.items() if not s.pinned}
    rank = {
        "lru": lambda s: s.used,
        "fifo": lambda s: s.inserted,
        "lfu": lambda s: (s.uses, s.used),
        "cost_aware": lambda s: (s.age + s.gain, s.used),
    }[name]
    return min(free, key=lambda key: rank(free[key])) if free else None


OPS = st.lists(
    st.tuples(st.sampled_from(["insert", "touch", "pin", "unpin", "evict", "remove"]),
              st.integers(0, 9)),
    max_size=120,
)  # fmt: skip


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@settings(max_examples=60, deadline=None)
@given(ops=OPS)
def test_the_victim_is_the_one_by_definition(name: str, ops: list[tuple[str, int]]) -> None:
    policy = make_eviction_policy(name)
    assert isinstance(policy, HeapPolicy)
    seen: dict[int, Seen] = {}
    age = 0.0
    for now, (op, key) in enumerate(ops):
        if op == "insert" and key not in seen:
            policy.insert(key, cost_s=float(key % 4), nbytes=2)
            seen[key] = Seen(now, now, (key % 4) / 2, age=age)
        elif op == "touch" and key in seen:
            policy.touch(key)
            seen[key].uses, seen[key].used, seen[key].age = seen[key].uses + 1, now, age
        elif op in ("pin", "unpin") and key in seen:
            getattr(policy, op)(key)
            seen[key].pinned = op == "pin"
        elif op == "remove" and key in seen:
            policy.remove(key)
            del seen[key]
        elif op == "evict":
            expected = least(name, seen)
            if expected is None:
                with pytest.raises(LookupError):
                    policy.victim()
                continue
            assert policy.victim() == expected
            age = max(age, seen[expected].age + seen[expected].gain)
            policy.remove(expected)
            del seen[expected]
        assert len(policy) == len(seen)
        policy.check_invariants()


def test_cost_aware_keeps_what_saves_more_per_byte_but_not_for_ever() -> None:
    policy = make_eviction_policy("cost_aware")
    policy.insert("dear", cost_s=4.0)
    policy.insert("dear but large", cost_s=4.0, nbytes=8)
    policy.insert("cheap", cost_s=1.0)
    order = []
    for number in range(12):
        victim = policy.victim()
        order.append(victim)
        policy.remove(victim)
        policy.insert(f"new {number}", cost_s=1.0)
    assert order[:2] == ["dear but large", "cheap"]
    assert "dear" in order[2:], "ageing must get rid of what is dear and never used"


def test_the_heap_does_not_grow_with_use() -> None:
    policy = make_eviction_policy("lru")
    assert isinstance(policy, HeapPolicy)
    for key in range(50):
        policy.insert(key)
    for turn in range(2000):
        key = turn % 50
        policy.pin(key)
        policy.touch(key)
        policy.unpin(key)
        policy.remove(key)
        policy.insert(key)
    assert len(policy._heap) <= 2 * 50 + 65


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="lru, lfu, fifo, cost_aware"):
        make_eviction_policy("random")
    policy = make_eviction_policy("lru")
    policy.insert("a")
    with pytest.raises(ValueError, match="already"):
        policy.insert("a")
    with pytest.raises(ValueError, match="nbytes"):
        policy.insert("b", nbytes=0)
    assert make_eviction_policy(policy) is policy
