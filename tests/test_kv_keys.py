"""Content keys of KV blocks: equal prefixes are the same object, nothing else is."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch15_helpers.kv.keys import KeyTable


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=2, max_size=6))
def test_a_key_is_its_whole_prefix(prompts: list[list[int]]) -> None:
    table = KeyTable(2)
    held = [(tuple(p[: 2 * i + 2]), k) for p in prompts for i, k in enumerate(table.keys_of(p))]
    for prefix, key in held:
        assert key.prefix_tokens() == prefix
        for other_prefix, other in held:
            assert (key is other) == (prefix == other_prefix)
            assert (key.digest == other.digest) == (prefix == other_prefix)


def test_same_tokens_after_another_prefix_are_another_key() -> None:
    table = KeyTable(2)
    first, second = (list(table.keys_of(tokens)) for tokens in ([1, 2, 7, 8], [3, 4, 7, 8]))
    assert first[1].tokens == second[1].tokens
    assert first[1] is not second[1]
    assert first[1].digest != second[1].digest


def test_colliding_hashes_do_not_merge_keys() -> None:
    class SameHash(int):
        def __hash__(self) -> int:
            return 1

    table = KeyTable(1)
    keys = [table.intern(None, [SameHash(n)]) for n in range(20)]
    assert len({id(key) for key in keys}) == 20


def test_keys_die_with_their_holders() -> None:
    table = KeyTable(1)
    keys = list(table.keys_of(range(100)))
    last = keys[-1]
    del keys
    gc.collect()
    assert len(table) == 100, "a key keeps its prefix alive"
    assert last.depth == 99
    del last
    gc.collect()
    assert len(table) == 0


def test_partial_blocks_have_no_key() -> None:
    table = KeyTable(4)
    assert len(list(table.keys_of(range(7)))) == 1
    with pytest.raises(ValueError, match="4 tokens, got 3"):
        table.intern(None, [1, 2, 3])
