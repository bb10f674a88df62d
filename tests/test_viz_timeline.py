"""Timelines tell what happened, and one move of the batching explorer is quick."""

from __future__ import annotations

import time

import pytest

from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.policy import make_policy
from ch15_helpers.serving.simulator import simulate
from ch15_helpers.serving.step_time import StepTimeModel
from ch15_helpers.serving.step_time_data import load_step_time
from ch15_helpers.serving.workload import Workload, WorkloadRequest, azure_conversation
from ch15_helpers.viz import request_spans, timeline
from ch15_helpers.viz.plots import png_bytes


def test_spans_by_hand() -> None:
    # Steps of 1 s and 0.5 s for each prompt token: a's prompt until 3, then b's stalls a.
    model = StepTimeModel(1.0, prefill_token_s=0.5)
    work = Workload("w", (WorkloadRequest(0.0, 4, 3), WorkloadRequest(3.5, 6, 1)))
    config = SchedulerConfig(block_size=4, num_blocks=20)
    a, b = request_spans(simulate(work, config, model), stall_s=2.0)
    assert (a.arrival_s, a.started_s, a.first_token_s, a.end_s) == (0.0, 0.0, 3.0, 8.0)
    assert a.stalls_s == ((4.0, 8.0),)
    assert (b.arrival_s, b.started_s, b.first_token_s, b.end_s) == (3.5, 4.0, 8.0, 8.0)
    assert request_spans(simulate(work, config, model))[0].stalls_s == ()
    refused = simulate(work, SchedulerConfig(block_size=4, num_blocks=1), model)
    assert request_spans(refused) == []  # neither ever fits


def test_a_panel_for_each_run_says_whether_it_is_modelled() -> None:
    model = load_step_time("cpu").model
    work = azure_conversation(30, seed=1, rate_per_s=4.0).scaled(prompt=0.05, output=0.05)
    runs = {
        name: simulate(work, SchedulerConfig(policy=make_policy(name)), model)
        for name in ("static", "fcfs")
    }
    figure = timeline(runs, num_requests=20, stall_s=0.1, title="30 requests")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["30 requests: static (modelled)", "30 requests: fcfs (modelled)"]
    lines = figure.axes[0].collections[2].get_segments()
    assert len(lines) == 20
    spans = request_spans(runs["static"])[7]
    assert lines[7].tolist() == [[spans.first_token_s, 7.0], [spans.end_s, 7.0]]
    assert png_bytes(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one run"):
        timeline({})


def test_one_move_of_the_explorer_simulates_and_draws_quickly() -> None:
    # 200 ms on an idle core is the promise; the bound leaves room for a busy CI machine.
    model = load_step_time("cpu").model
    work = azure_conversation(200, seed=1, rate_per_s=4.0).scaled(prompt=0.05, output=0.05)

    def move() -> float:
        start_s = time.process_time()
        run = simulate(work, SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=80), model)
        png_bytes(timeline({"fcfs": run}, num_requests=60, stall_s=0.2), dpi=90)
        return time.process_time() - start_s

    move()
    assert min(move() for _ in range(3)) < 0.6
