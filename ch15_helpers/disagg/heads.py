"""Which KV heads go where when prefill and decode split them over different numbers of ranks.

With tensor parallelism of degree ``t`` rank ``r`` holds the KV heads ``[r*H/t, (r+1)*H/t)``. A
prefill rank therefore sends each decode rank the heads that both of them hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadRoute:
    """Heads ``first .. last - 1``, numbered globally, go from one rank to another."""

    source: int
    target: int
    heads: tuple[int, int]


def heads_of(rank: int, degree: int, num_kv_heads: int) -> tuple[int, int]:
    """The heads that a rank holds.

    Raises:
        ValueError: the heads cannot be split evenly, or there is no such rank.
    """
    if degree < 1 or num_kv_heads % degree:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be split over {degree} ranks; the degree must divide "
            "their number"
        )
    if not 0 <= rank < degree:
        raise ValueError(f"rank must be in 0..{degree - 1}, got {rank}")
    share = num_kv_heads // degree
    return rank * share, (rank + 1) * share


def head_routes(num_kv_heads: int, source_degree: int, target_degree: int) -> Iterator[HeadRoute]:
    """Every (source rank, target rank) pair that must exchange heads, and which."""
    for source in range(source_degree):
        low, high = heads_of(source, source_degree, num_kv_heads)
        for target in range(target_degree):
            first, last = heads_of(target, target_degree, num_kv_heads)
            if max(low, first) < min(high, last):
                yield HeadRoute(source, target, (max(low, first), min(high, last)))
