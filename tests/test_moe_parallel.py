"""Expert parallelism between real gloo processes against a float64 dense reference."""

from __future__ import annotations

from typing import Any

import moe_workers
import pytest


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[int, Any]:
    """What each rank found, all in one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    return moe_workers.run_ranks(request.param, "everything", folder)


def test_many_ranks_equal_one_and_bytes_are_counted(answers: dict[int, Any]) -> None:
    for rank, found in answers.items():
        cases = found["random"]
        assert len(cases) > 20
        wrong = [c for c in cases if not (c["error"] < 1e-6 and c["links"])]
        assert not wrong, f"rank {rank}"
    assert sum(c["bytes"] for c in answers[0]["random"]) > 100_000


def test_fp8_dispatch_rounds_each_token_once(answers: dict[int, Any]) -> None:
    """Also through a node, where it is encoded twice; results are those of the rounded input."""
    for found in answers.values():
        for name in ("fp8", "fp8 nodes", "fp8 pairs"):
            of_rounded, of_input = found[name]
            assert of_rounded < 1e-6
            assert 5e-3 < of_input < 5e-2
        assert found["fp8 none"] < 6e-2
        assert found["bf16"] < 6e-2


def test_capacity_drops_the_last_pairs_and_nothing_else(answers: dict[int, Any]) -> None:
    for found in answers.values():
        for error, dropped, expected, links in found["capacity"]:
            assert error < 1e-6 and links
            assert dropped == expected > 0


def test_a_nan_touches_no_other_token_on_any_rank(answers: dict[int, Any]) -> None:
    assert all(found["nan"] for found in answers.values())


def test_overlap_changes_no_result(answers: dict[int, Any]) -> None:
    for found in answers.values():
        assert not [case for case in found["overlap"] if not case[1] < 1e-5]


def test_a_model_with_experts_on_many_ranks_is_the_model(answers: dict[int, Any]) -> None:
    assert all(max(found["model"]) < 1e-5 for found in answers.values())


def test_weights_move_between_ranks_and_results_stay(answers: dict[int, Any]) -> None:
    for found in answers.values():
        assert not [case for case in found["rebalance"] if not (case[0] < 1e-6 and case[1])]
