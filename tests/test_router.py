"""The router: who gets what, what is open, and what a death does to it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch15_helpers.errors import NoReplicaError
from ch15_helpers.serving.prefix_index import PrefixIndex, segment_keys, token_keys
from ch15_helpers.serving.router import Router
from ch15_helpers.serving.routing import ROUTING_POLICIES, KVAware, RoutedRequest, SessionSticky

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def request(
    number: int, prompt: int = 100, output: int = 10, document: int = -1, session: int | None = None
) -> RoutedRequest:
    """A request whose prompt, but for its last ten tokens, is the document's."""
    shared = prompt - 10
    keys = () if document < 0 else segment_keys([(document, shared), (-1 - number, 10)], 16)
    return RoutedRequest(f"r{number}", prompt, output, keys, session)


# ---- whatever the policy ---------------------------------------------------------------------


@QUICK
@given(st.sampled_from(ROUTING_POLICIES), st.integers(1, 5), st.integers(0, 10**6))
def test_a_long_walk(policy: str, replicas: int, seed: int) -> None:
    """Random work, deaths and returns: no dead replica is used, every request is answered once."""
    rng = random.Random(seed)
    router = Router(replicas, policy, seed=seed)
    unplaced: list[RoutedRequest] = []
    answers: dict[str, int] = {}
    issued: list[int] = []
    for number in range(60):
        event = rng.random()
        if event < 0.5:
            unplaced.append(
                request(number, rng.randint(20, 200), 5, rng.randint(-1, 3), rng.randint(0, 3))
            )
        elif event < 0.75 and issued:
            # Any attempt ever made may answer, late or twice.
            attempt = router.complete(rng.choice(issued))
            if attempt is not None:
                name = attempt.request.request_id
                answers[name] = answers.get(name, 0) + 1
        elif event < 0.85:
            orphans = router.mark_dead(rng.randrange(replicas))
            unplaced += [orphan.request for orphan in orphans]
        else:
            router.mark_alive(rng.randrange(replicas))
        while unplaced and router.loads.living:
            attempt = router.route(unplaced.pop(0))
            assert router.loads.alive[attempt.replica]
            issued.append(attempt.attempt_id)
        router.check_invariants()
    router.mark_alive(0)
    issued += [router.route(each).attempt_id for each in unplaced]
    for attempt_id in issued:
        done = router.complete(attempt_id)
        if done is not None:
            answers[done.request.request_id] = answers.get(done.request.request_id, 0) + 1
    assert set(answers.values()) <= {1}
    assert router.num_open == 0
    assert sum(router.loads.outstanding) == 0


def test_all_dead_is_an_error_that_says_so() -> None:
    router = Router(2, "power_of_two")
    router.mark_dead(0)
    router.mark_dead(1)
    with pytest.raises(NoReplicaError, match="'r7' cannot be placed: all 2 replicas are dead"):
        router.route(request(7))
    router.mark_alive(1)
    assert router.route(request(7)).replica == 1


def test_an_attempt_of_a_dead_replica_does_not_count() -> None:
    router = Router(2)
    first = router.route(request(0))
    assert [orphan.attempt_id for orphan in router.mark_dead(first.replica)] == [first.attempt_id]
    second = router.route(first.request)
    assert router.complete(first.attempt_id) is None
    assert router.complete(second.attempt_id) is second
    assert router.complete(second.attempt_id) is None
    assert (router.num_completed, router.num_late) == (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Router(0), "at least one replica"),
        (lambda: Router(2, "random"), "no routing policy 'random'"),
        (lambda: Router(2).mark_dead(2), "no replica 2"),
        (lambda: KVAware(2, cap_factor=0.5), "cap_factor >= 1"),
        (lambda: PrefixIndex(2, 0), "capacity_blocks"),
        (lambda: SessionSticky(0), "capacity"),
    ],
)
def test_nonsense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# ---- each policy -----------------------------------------------------------------------------


def test_round_robin_takes_turns_and_skips_the_dead() -> None:
    router = Router(3, "round_robin")
    router.mark_dead(1)
    assert [router.route(request(n)).replica for n in range(5)] == [0, 2, 0, 2, 0]


def test_least_outstanding_counts_tokens_not_requests() -> None:
    router = Router(2, "least_outstanding_tokens")
    first = router.route(request(0, prompt=1000))
    others = [router.route(request(n, prompt=100)).replica for n in range(1, 5)]
    assert others == [1 - first.replica] * 4


def test_idle_replicas_take_turns() -> None:
    router = Router(4, "least_outstanding_tokens")
    places = []
    for number in range(8):
        attempt = router.route(request(number))
        router.complete(attempt.attempt_id)
        places.append(attempt.replica)
    assert places == [0, 1, 2, 3, 0, 1, 2, 3]


def test_two_choices_beat_one() -> None:
    """n balls in n bins: the fullest has log log n / log 2 + O(1), not log n / log log n."""
    count = 1000
    one: list[int] = []
    two: list[int] = []
    for seed in range(5):
        rng = random.Random(seed)
        bins = [0] * count
        for _ in range(count):
            bins[rng.randrange(count)] += 1
        one.append(max(bins))
        router = Router(count, "power_of_two", seed=seed)
        for number in range(count):
            router.route(request(number, prompt=1, output=1))
        two.append(max(router.loads.outstanding) // 2)
    assert max(two) <= math.ceil(math.log2(math.log(count))) + 1  # 4
    assert min(one) > max(two)


def test_the_choices_are_seeded() -> None:
    def places(seed: int) -> list[int]:
        router = Router(10, "power_of_two", seed=seed)
        return [router.route(request(n)).replica for n in range(30)]

    assert places(1) == places(1) != places(2)


def test_a_session_stays_until_its_replica_dies() -> None:
    router = Router(3, "session_sticky")
    home = {s: router.route(request(s, session=s)).replica for s in range(6)}
    assert sorted(home.values()) == [0, 0, 1, 1, 2, 2]
    for turn in range(1, 4):
        for s in range(6):
            assert router.route(request(10 * turn + s, session=s)).replica == home[s]
    router.mark_dead(home[0])
    moved = router.route(request(99, session=0)).replica
    assert moved != home[0]
    assert router.route(request(100, session=0)).replica == moved


def test_forgotten_sessions_start_anew() -> None:
    policy = SessionSticky(capacity=2)
    router = Router(2, policy)
    for number in range(5):
        router.route(request(number, session=number))
    assert len(policy._home) == 2


# ---- kv_aware --------------------------------------------------------------------------------


def kv_router(replicas: int, **options: float) -> tuple[Router, KVAware]:
    policy = KVAware(replicas, **options)  # type: ignore[arg-type]
    return Router(replicas, policy), policy


def test_equal_prefixes_go_together_under_light_load() -> None:
    router, _ = kv_router(4)
    homes: dict[int, set[int]] = {}
    for number in range(64):
        document = number % 8
        attempt = router.route(request(number, document=document))
        homes.setdefault(document, set()).add(attempt.replica)
        router.complete(attempt.attempt_id)
    assert all(len(where) == 1 for where in homes.values())
    assert sorted(min(where) for where in homes.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_hot_prefix_spreads_under_heavy_load() -> None:
    router, _ = kv_router(4, cap_tokens=100, load_weight=0.0)
    for number in range(200):
        router.route(request(number, document=0))
    tokens = router.loads.outstanding
    assert 0 < min(tokens) <= max(tokens) <= 1.25 * sum(tokens) / 4 + 100 + 110
    # Without a cap all of it lands on one replica.
    loose, _ = kv_router(4, cap_factor=math.inf, load_weight=0.0)
    places = {loose.route(request(number, document=0)).replica for number in range(200)}
    assert len(places) == 1


@QUICK
@given(st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_load_cap_holds(replicas: int, seed: int, weight: float) -> None:
    rng = random.Random(seed)
    router, policy = kv_router(replicas, cap_tokens=300, load_weight=weight)
    placed: list[int] = []
    for number in range(80):
        if placed and rng.random() < 0.4:
            router.complete(placed.pop(rng.randrange(len(placed))))
        cap, before = policy.cap(router.loads), list(router.loads.outstanding)
        least = router.loads.least()
        attempt = router.route(request(number, rng.randint(20, 150), 5, rng.randint(0, 2)))
        placed.append(attempt.attempt_id)
        assert attempt.replica == least or before[attempt.replica] <= cap
        policy.index.check_invariants()


def test_the_score_is_the_best_of_all_replicas() -> None:
    """The search from the deepest match stops early; it must find what a full search finds."""
    rng = random.Random(3)
    router, policy = kv_router(6, cap_tokens=600, load_weight=0.05)
    open_ids: list[int] = []
    for number in range(400):
        asked = request(number, rng.randint(30, 300), 5, rng.randint(0, 4))
        loads = router.loads
        least, cap = loads.least(), policy.cap(loads)
        scores = {
            r: 16 * policy.index.depth(asked.keys, r)
            - 0.05 * (loads.outstanding[r] - loads.outstanding[least])
            for r in range(6)
            if r == least or loads.outstanding[r] <= cap
        }
        attempt = router.route(asked)
        assert scores[attempt.replica] == max(scores.values())
        open_ids.append(attempt.attempt_id)
        if len(open_ids) > 12:
            router.complete(open_ids.pop(rng.randrange(12)))


def test_cached_tokens_are_not_counted_as_load() -> None:
    router, _ = kv_router(2)
    router.complete(router.route(request(0, document=5)).attempt_id)
    again = router.route(request(1, document=5))
    assert again.matched_tokens == 80  # five full blocks of the 90 tokens shared
    assert router.loads.outstanding[again.replica] == 100 - 80 + 10


def test_a_death_empties_what_is_known_of_the_cache() -> None:
    router, policy = kv_router(2)
    home = router.route(request(0, document=5)).replica
    router.mark_dead(home)
    router.mark_alive(home)
    assert policy.index.num_blocks(home) == 0
    assert router.route(request(1, document=5)).matched_tokens == 0


# ---- the index -------------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_the_index_is_bounded_and_closed_under_prefixes(seed: int, capacity: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(3, capacity)
    prompts = [tuple(range(100 * d, 100 * d + rng.randint(1, 20))) for d in range(6)]
    for _ in range(40):
        index.note(rng.randrange(3), prompts[rng.randrange(6)])
        index.check_invariants()
        for keys in prompts:
            for replica in range(3):
                known = [replica in index.holders(key) for key in keys]
                depth = index.depth(keys, replica)
                assert known == [True] * depth + [False] * (len(keys) - depth)
            assert index.deepest(keys) == max(index.depth(keys, r) for r in range(3))


def test_keys_name_the_prefix_and_nothing_else() -> None:
    tokens = list(range(50))
    keys = token_keys(tokens, 16)
    assert len(keys) == 3
    assert token_keys([*tokens[:40], 7], 16)[:2] == keys[:2]
    other = token_keys([1, *tokens[1:]], 16)
    assert not set(other) & set(keys)
    swapped = token_keys([*tokens[16:32], *tokens[:16], *tokens[32:]], 16)
    assert not set(swapped) & set(keys)


def test_segments_give_the_keys_that_their_tokens_would() -> None:
    """Equal where the content is equal, and only there: compared with real tokens."""
    from ch15_helpers.serving.workload import Workload, WorkloadRequest

    rng = random.Random(1)
    requests = []
    for _ in range(40):
        segments = tuple((rng.randint(0, 3), rng.randint(1, 40)) for _ in range(rng.randint(1, 5)))
        size = sum(n for _, n in segments)
        requests.append(WorkloadRequest(0.0, size, 1, segments))
    workload = Workload("w", tuple(requests))
    by_tokens: dict[int, set[int]] = {}
    for index, each in enumerate(requests):
        real = token_keys(workload.prompt(index, 1000), 8)
        named = segment_keys(each.segments, 8)
        assert len(real) == len(named)
        for token_key, segment_key in zip(real, named, strict=True):
            by_tokens.setdefault(token_key, set()).add(segment_key)
    # Segments (a, 5), (a, 5) are the same content at another split only by chance; names agree
    # wherever whole segments agree, so a name never stands for two contents.
    names = [name for group in by_tokens.values() for name in group]
    assert len(names) == len(set(names))
