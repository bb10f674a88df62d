"""Routing policies: which replica gets a request, from what the router itself knows.

Round robin and least loaded are what every load balancer has; two random choices bring the
largest load from log n / log log n down to log log n (Mitzenmacher 2001; Azar et al. 1999). The
KV-aware policy follows SGLang's cache-aware router and NVIDIA Dynamo's KV router: the longest
matching prefix wins, less what is queued there, and a load cap (as in consistent hashing with
bounded loads, Mirrokni et al. 2018) keeps one hot prefix from overloading its replica.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from ch15_helpers.serving.loads import Loads
from ch15_helpers.serving.prefix_index import Key, PrefixIndex

PolicyName = Literal[
    "round_robin", "least_outstanding_tokens", "power_of_two", "kv_aware", "session_sticky"
]
ROUTING_POLICIES: tuple[str, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a router may know of a request.

    Attributes:
        request_id: the caller's name for it.
        num_prompt_tokens, num_output_tokens: the second is the most that it may generate.
        keys: names of the prompt's full blocks (``token_keys`` or ``segment_keys``).
        session: conversation; None is none.
    """

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    keys: tuple[Key, ...] = ()
    session: int | None = None


class Choice(NamedTuple):
    """A replica, and how many leading prompt tokens its cache should have."""

    replica: int
    matched_tokens: int = 0


class RoutingPolicy(Protocol):
    """Chooses among the replicas that are alive; there is at least one."""

    name: str

    def choose(self, request: RoutedRequest, loads: Loads) -> Choice:
        """Where to send a request."""

    def sent(self, request: RoutedRequest, replica: int) -> None:
        """It went there."""

    def lost(self, replica: int) -> None:
        """A replica died, and its cache with it."""


class _Stateless:
    """Remembers nothing about requests."""

    def sent(self, request: RoutedRequest, replica: int) -> None:
        """See RoutingPolicy."""

    def lost(self, replica: int) -> None:
        """See RoutingPolicy."""


class RoundRobin(_Stateless):
    """One after the other."""

    name = "round_robin"

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: RoutedRequest, loads: Loads) -> Choice:
        """See RoutingPolicy."""
        alive = loads.alive
        while not alive[self._turn % len(alive)]:
            self._turn += 1
        self._turn += 1
        return Choice((self._turn - 1) % len(alive))


class LeastOutstandingTokens(_Stateless):
    """The replica with the fewest tokens that are promised and not delivered."""

    name = "least_outstanding_tokens"

    def choose(self, request: RoutedRequest, loads: Loads) -> Choice:
        """See RoutingPolicy."""
        return Choice(loads.least())


class PowerOfTwo(_Stateless):
    """The less loaded of two random replicas: two look-ups instead of all."""

    name = "power_of_two"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, request: RoutedRequest, loads: Loads) -> Choice:
        """See RoutingPolicy."""
        if len(loads.living) == 1:
            return Choice(loads.living[0])
        first, second = self._rng.sample(loads.living, 2)
        tokens = loads.outstanding
        return Choice(first if tokens[first] <= tokens[second] else second)


class SessionSticky:
    """A conversation stays where it began; new ones go to the least loaded replica.

    Args:
        capacity: sessions remembered, least recent forgotten first.
    """

    name = "session_sticky"

    def __init__(self, capacity: int = 100_000) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._home: OrderedDict[int, int] = OrderedDict()

    def choose(self, request: RoutedRequest, loads: Loads) -> Choice:
        """See RoutingPolicy."""
        home = None if request.session is None else self._home.get(request.session)
        return Choice(home if home is not None and loads.alive[home] else loads.least())

    def sent(self, request: RoutedRequest, replica: int) -> None:
        """See RoutingPolicy."""
        if request.session is None:
            return
        self._home[request.session] = replica
        self._home.move_to_end(request.session)
        if len(self._home) > self.capacity:
            self._home.popitem(last=False)

    def lost(self, replica: int) -> None:
        """See RoutingPolicy; its sessions move when they next ask."""


class KVAware:
    """The longest matching prefix, less the load; the least loaded where that is over the cap.

    The score of replica r, in tokens, is ``matched(r) - load_weight * (load(r) - least load)``.
    Only replicas whose load is at most ``cap_tokens + cap_factor * mean load`` are considered,
    and the least loaded one always is.

    Args:
        block_size: tokens of one key of a request.
        capacity_blocks: blocks remembered per replica, see PrefixIndex.
        load_weight: prompt tokens that one token of load is worth. A prompt token that need not
            be computed is saved at once; a queued token delays the request only in part.
        cap_factor, cap_tokens: the load cap; ``math.inf`` is none.
    """

    name = "kv_aware"

    def __init__(
        self,
        num_replicas: int,
        *,
        block_size: int = 16,
        capacity_blocks: int = 4096,
        load_weight: float = 0.1,
        cap_factor: float = 1.25,
        cap_tokens: float = 2048,
    ) -> None:
        if block_size < 1 or load_weight < 0 or cap_factor < 1 or cap_tokens < 0:
            raise ValueError(
                "kv_aware needs block_size >= 1, load_weight >= 0, cap_factor >= 1 and cap_tokens "
                f">= 0, got {block_size}, {load_weight}, {cap_factor} and {cap_tokens}"
            )
        self.block_size = block_size
        self.load_weight = load_weight
        self.cap_factor, self.cap_tokens = cap_factor, cap_tokens
        self.index = PrefixIndex(num_replicas, capacity_blocks)

    def cap(self, loads: Loads) -> float:
        """Largest load at which a replica is still considered."""
        if math.isinf(self.cap_factor):
            return math.inf
        return self.cap_tokens + self.cap_factor * loads.mean

    def choose(self, request: RoutedRequest, loads: Loads) -> Choice:
        """See RoutingPolicy."""
        keys, index, size = request.keys, self.index, self.block_size
        least = loads.least()
        if not keys:
            return Choice(least)
        tokens = loads.outstanding
        best, best_depth = least, index.depth(keys, least)
        best_score: float = best_depth * size
        cap = self.cap(loads)
        seen: set[int] = set()
        for depth in range(index.deepest(keys), 0, -1):
            if depth * size <= best_score:  # no replica at this depth or above can do better
                break
            for replica in index.holders(keys[depth - 1]):
                if replica in seen:
                    continue
                seen.add(replica)
                score = depth * size - self.load_weight * (tokens[replica] - tokens[least])
                if score > best_score and tokens[replica] <= cap:
                    best, best_depth, best_score = replica, depth, score
        return Choice(best, best_depth * size)

    def sent(self, request: RoutedRequest, replica: int) -> None:
        """See RoutingPolicy."""
        self.index.note(replica, request.keys)

    def lost(self, replica: int) -> None:
        """See RoutingPolicy."""
        self.index.clear(replica)


def make_routing_policy(name: str, num_replicas: int, seed: int = 0) -> RoutingPolicy:
    """A policy by name, with its defaults.

    Raises:
        ValueError: there is no such policy; lists those that there are.
    """
    if name == "round_robin":
        return RoundRobin()
    if name == "least_outstanding_tokens":
        return LeastOutstandingTokens()
    if name == "power_of_two":
        return PowerOfTwo(seed)
    if name == "session_sticky":
        return SessionSticky()
    if name == "kv_aware":
        return KVAware(num_replicas)
    raise ValueError(f"there is no routing policy {name!r}; choose from {ROUTING_POLICIES}")
