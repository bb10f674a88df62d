"""The account of one step adds up, and Nsight Compute's report is read as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ch15_helpers.bench import nsight
from ch15_helpers.bench.step_profile import GAPS, StepTrace, from_events, kind_of, table, trace_step
from ch15_helpers.errors import Ch15Error
from ch15_helpers.viz.step_trace import step_strips


def event(name: str, start: float, end: float, device: str = "DeviceType.CUDA") -> Any:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, cpu_parent=None)


def gpu_trace() -> StepTrace:
    """Two kernels that overlap, a gap of 3 µs, a third; the host's call is not one of them."""
    return from_events(
        [
            event("nvjet_tst_128x8", 110, 120),
            event("aten::mm", 90, 100, "DeviceType.CPU"),
            event("_paged_decode_attention_kernel", 100, 112),
            event("_rms_norm_kernel", 123, 130),
        ],
        "cuda",
    )


def test_spans_gaps_and_kinds_of_a_gpu_step() -> None:
    trace = gpu_trace()
    assert [s.kind for s in trace.spans] == [
        "attention",
        "matrix products",
        "norm, rotation, activation",
    ]
    assert trace.wall_s == pytest.approx(30e-6)
    assert trace.gap_s == pytest.approx(3e-6)
    parts = trace.by_kind()
    assert list(parts)[-1] == GAPS
    # Overlap counts twice in the kinds, once in the busy time.
    assert sum(parts.values()) - trace.wall_s == pytest.approx(2e-6)


def test_a_step_without_work_is_an_error() -> None:
    with pytest.raises(ValueError, match="saw nothing run on cuda"):
        from_events([event("aten::mm", 0, 1, "DeviceType.CPU")], "cuda")


def test_a_cpu_step_shows_the_operators_that_python_called(capfd: pytest.CaptureFixture) -> None:
    x = torch.randn(64, 64)
    trace = trace_step(lambda: torch.nn.functional.linear(x, x).argmax(), "cpu")
    assert [s.name for s in trace.spans] == ["aten::linear", "aten::argmax"]
    assert [s.kind for s in trace.spans] == ["matrix products", "sampling"]
    assert capfd.readouterr().err == ""


def test_unknown_kernels_are_other() -> None:
    assert kind_of("some_new_thing") == "other"


def test_the_table_accounts_for_the_whole_step() -> None:
    text = table({"decode": gpu_trace()})
    assert "| attention | 0.012 | 40% |" in text
    assert "| gaps | 0.003 | 10% |" in text
    assert "| whole | 0.03 | 3 spans |" in text


def test_the_strips_have_one_panel_for_each_step() -> None:
    figure = step_strips({"decode": gpu_trace(), "prefill": gpu_trace()})
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0] == "decode: 3 kernels and copies, 90% of the time busy"
    assert len(titles) == 2
    with pytest.raises(ValueError, match="at least one step"):
        step_strips({})


TIME, DRAM, SM = nsight.METRICS.values()
REPORT = f'''==PROF== some notice
"ID","Kernel Name","{TIME}","{DRAM}","{SM}"
"","","ns","%","%"
"0","void ns::decode<128>(int)","2,000","80.0","20.0"
"1","void ns::decode<128>(int)","4,000","90.0","30.0"
"2","norm(float*)","1,500","50.0","10.0"
'''


def test_figures_are_medians_over_the_launches_of_a_kernel() -> None:
    decode, norm = nsight.parse(REPORT)
    assert (decode.name, decode.launches, norm.name) == ("decode", 2, "norm")
    assert decode.time_us == pytest.approx(3.0)
    assert decode.dram == pytest.approx(0.85)
    assert decode.sm == pytest.approx(0.25)
    assert nsight.describe([decode]) == [
        "decode: 2 launches of 3.0 µs, DRAM at 85% and SMs at 25% of their peak rates"
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "no kernel"), (REPORT.replace(DRAM, "other"), f"lacks {DRAM}")],
)
def test_a_report_that_cannot_be_read_says_why(text: str, complaint: str) -> None:
    with pytest.raises(Ch15Error, match=complaint):
        nsight.parse(text)


def test_stored_figures_of_the_attention_kernel() -> None:
    text = nsight.stored("h200")
    assert "| paged decode attention, 64 x 4096 | 244.9 µs | 92% | 30% |" in text
    assert "NVIDIA H200" in text
