"""The whole engine beside its limits and beside the peers' recorded numbers.

Run it with ``python -m ch15_helpers.bench.engine --device cuda``. Every row is one workload on an
idle, warm engine: prompts of random token ids, greedy, end-of-sequence tokens ignored, no reuse of
prefixes. The limit adds up, step by step, the larger of bytes over read bandwidth and operations
over matmul rate, both measured in the same run. Set-up (weights, pool, warm-up, capture) is not in
a row's time; it is reported beside them. The limit counts every layer for every prompt token, as
peers compute them; our last layer leaves out what nobody samples, 3 % of a prompt's operations
with 32 layers. On a CPU the model and the workloads are tiny.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from ch15_helpers.bench.expectations import write_json_atomically
from ch15_helpers.bench.profiling import profiled
from ch15_helpers.bench.records import fastest_peer
from ch15_helpers.bench.roofline import decode_step_work, limit_s, prefill_work
from ch15_helpers.bench.runs import commit_id
from ch15_helpers.errors import Ch15Error
from ch15_helpers.hardware import Ceilings, HardwareProfile
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.model.loading import load_model
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import Engine, StepRecord
from ch15_helpers.serving.memory import throughput_tokens
from ch15_helpers.serving.request import SamplingParams

Unit = Literal["tok/s", "ms/token", "s", "ms/step"]
HIGHER_IS_BETTER: Unit = "tok/s"


@dataclass(frozen=True)
class Load:
    """Requests that all arrive at once.

    Attributes:
        prompts, outputs: tokens of each request.
        unit: output tokens per second; milliseconds per output token; seconds in all; or the
            median milliseconds of the steps in which prompts and decodes meet.
    """

    name: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    unit: Unit = "tok/s"

    def value(self, elapsed_s: float) -> float:
        """Seconds of the whole load in the row's unit."""
        if self.unit == "tok/s":
            return sum(self.outputs) / elapsed_s
        if self.unit == "ms/token":
            return elapsed_s / max(self.outputs) * 1e3
        return elapsed_s

    def limit_s(self, config: ModelConfig, ceilings: Ceilings, dtype: torch.dtype) -> float:
        """Least seconds: one step for all prompts, then as many decode steps as are asked for."""
        size = dtype.itemsize
        total = limit_s(prefill_work(config, self.prompts, size), ceilings, dtype)
        for done in range(1, max(self.outputs)):
            lens = [p + done for p, o in zip(self.prompts, self.outputs, strict=True) if o > done]
            total += limit_s(decode_step_work(config, lens, size), ceilings, dtype)
        return total


@dataclass(frozen=True)
class EngineRow:
    """``achieved``, ``limit`` and ``peer`` in ``unit``.

    Attributes:
        elapsed_s: of each run. steps: of one run.
    """

    model: str
    load: str
    unit: Unit
    achieved: float
    limit: float | None
    peer: float | None
    elapsed_s: tuple[float, ...]
    steps: int

    @property
    def fraction(self) -> float | None:
        """1.0 is the limit."""
        return None if self.limit is None else self._better(self.limit)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer."""
        return None if self.peer is None else self._better(self.peer)

    def _better(self, other: float) -> float:
        return self.achieved / other if self.unit == HIGHER_IS_BETTER else other / self.achieved


@dataclass(frozen=True)
class Suite:
    """Loads of one model on one kind of engine.

    Attributes:
        setting: of its EngineConfig; a token budget that is not in it is ``throughput_tokens``.
    """

    source: str
    setting: Mapping[str, Any]
    loads: tuple[Load, ...]


def gpu_suites() -> list[Suite]:
    """The rows of the comparison with vLLM, and shapes that nobody tuned for."""
    dice = random.Random(271)  # 72.7 thousand tokens, as the peers had
    uniform = tuple(dice.randint(64, 1024) for _ in range(128))
    mixed = tuple(16 * (1 + n % 16) for n in range(64))
    large = {"max_num_seqs": 128}
    return [
        Suite("random:LLAMA3_8B", large, (
            Load("128 requests", uniform, (128,) * 128),
            Load("1 request", (512,), (128,), "ms/token"),
            Load("4 prompts of 8000", (8000,) * 4, (1,) * 4, "s"),
            Load("32 requests of 512", (512,) * 32, (128,) * 32),
            Load("8 requests of 4000", (4000,) * 8, (128,) * 8),
            Load("60 of 100 and 4 of 6000", (100,) * 60 + (6000,) * 4, (64,) * 64),
            Load("64 of 256, 16 to 256 out", (256,) * 64, mixed),
        )),
        Suite("random:LLAMA3_8B", {**large, "block_size": 32}, (
            Load("128 requests, block 32", uniform, (128,) * 128),
        )),
        Suite("random:SMOLLM2_135M", {"max_num_batched_tokens": 256}, (
            Load("1 request", (512,), (128,), "ms/token"),
            Load("32 requests of 128", (128,) * 32, (64,) * 32),
            Load("32 of 128, mixed steps", (128,) * 32, (64,) * 32, "ms/step"),
        )),
    ]  # fmt: skip


def cpu_suites() -> list[Suite]:
    """The same code in a second or two."""
    return [Suite("random:TINY", {"max_num_batched_tokens": 64}, (
        Load("8 requests", (24,) * 8, (8,) * 8),
        Load("1 request", (32,), (16,), "ms/token"),
        Load("4 prompts of 100", (100,) * 4, (1,) * 4, "s"),
        Load("8 requests, mixed steps", (40,) * 8, (12,) * 8, "ms/step"),
    ))]  # fmt: skip


def random_prompts(load: Load, vocab_size: int) -> list[list[int]]:
    """The load's prompts, the same ones on every machine."""
    dice = random.Random(0)
    return [[dice.randrange(vocab_size) for _ in range(length)] for length in load.prompts]


def run_load(engine: Engine, load: Load, profile: HardwareProfile, *, rounds: int = 3) -> EngineRow:
    """Serve a load ``rounds`` times after a warm-up; the median counts."""
    config = engine.model.config
    prompts = random_prompts(load, config.vocab_size)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in load.outputs]
    mixed_s: list[float] = []

    def note(record: StepRecord) -> None:
        if record.step.chunks and record.step.decodes:
            mixed_s.append(record.end_s - record.start_s)

    elapsed = []
    for number in range(rounds + 1):
        steps = engine.num_steps
        engine.on_step = note if number else None
        start_s = time.perf_counter()
        outputs = engine.generate(prompts, params)
        elapsed.append(time.perf_counter() - start_s)
        wrong = [output.error for output in outputs if output.error is not None]
        if wrong:
            raise Ch15Error(f"{load.name}: {wrong[0]}")
    engine.on_step = None
    dtype = engine.model.dtype
    is_step = load.unit == "ms/step"
    least_s = load.limit_s(config, profile.ceilings, dtype)
    known = dtype == torch.bfloat16 and engine.model.source == "random:LLAMA3_8B"
    return EngineRow(
        model=engine.model.source,
        load=load.name,
        unit=load.unit,
        achieved=median(mixed_s) * 1e3 if is_step else load.value(median(elapsed[1:])),
        limit=None if is_step else load.value(least_s),
        peer=fastest_peer("engine", load.name, profile.key) if known else None,
        elapsed_s=tuple(elapsed[1:]),
        steps=engine.num_steps - steps,
    )


def make_engine(model: Transformer, suite: Suite) -> tuple[Engine, float]:
    """An engine for a suite, and the seconds that it took to set up."""
    start_s = time.perf_counter()
    longest = max(max(load.prompts) + max(load.outputs) for load in suite.loads)
    config = EngineConfig(**{"max_model_len": longest, **suite.setting})
    if "max_num_batched_tokens" not in suite.setting:
        tokens = throughput_tokens(model.config, config, model.device, model.dtype)
        config = replace(config, max_num_batched_tokens=tokens)
    engine = Engine(model, config)
    return engine, time.perf_counter() - start_s


def run_suites(
    suites: Sequence[Suite],
    profile: HardwareProfile,
    dtype: torch.dtype,
    *,
    only: str = "",
    rounds: int = 3,
    report: Callable[[str], None] = lambda _: None,
    profile_dir: Path | None = None,
) -> tuple[list[EngineRow], list[tuple[str, float]]]:
    """Rows, and what was set up in how many seconds; models are loaded once each."""
    rows: list[EngineRow] = []
    set_up: list[tuple[str, float]] = []
    model: Transformer | None = None
    for suite in suites:
        loads = [load for load in suite.loads if only in f"{suite.source} {load.name}"]
        if not loads:
            continue
        if model is None or model.source != suite.source:
            start_s = time.perf_counter()
            model = load_model(suite.source, device=profile.device, dtype=dtype)
            set_up.append((f"weights of {suite.source}", time.perf_counter() - start_s))
        engine, elapsed_s = make_engine(model, suite)
        settings = ", ".join(f"{name} {value}" for name, value in suite.setting.items())
        set_up.append((f"engine ({settings})", elapsed_s))
        for load in loads:
            report(load.name)
            rows.append(run_load(engine, load, profile, rounds=rounds))
            if profile_dir is not None:
                name = f"{suite.source}_{load.name}".replace(" ", "_").replace(":", "_")
                with profiled(name, "minimal", profile_dir):
                    run_load(engine, load, profile, rounds=1)
        engine.close()
        del engine
    return rows, set_up


def print_rows(
    rows: Sequence[EngineRow], set_up: Sequence[tuple[str, float]], console: Console
) -> None:
    """The table, and what setting up took."""
    names = "model", "load", "achieved", "limit", "unit", "fraction", "vLLM", "ratio", "steps"
    table = Table(*names)
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:.4g}"
        peer = "" if row.peer is None else f"{row.peer:.4g}"
        fraction = "" if row.fraction is None else f"{row.fraction:.1%}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = row.model, row.load, f"{row.achieved:.4g}", limit, row.unit, fraction, peer
        table.add_row(*cells, ratio, str(row.steps))
    console.print(table)
    for what, elapsed_s in set_up:
        console.print(f"set up: {what}: {elapsed_s:.1f} s")


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    only: Annotated[str, typer.Option(help="Part of a model's or load's name.")] = "",
    rounds: Annotated[int, typer.Option(help="Timed runs of each load.", min=1)] = 3,
    profile: Annotated[bool, typer.Option(help="A torch.profiler trace of each load.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for engine.json and traces.")] = None,
) -> None:
    """Print what the engine achieves of its limit."""
    console = Console(width=120)
    if profile and out is None:
        console.print("error: --profile needs --out, where the traces go")
        raise typer.Exit(2)
    try:
        hardware = HardwareProfile.measure(device)
        console.print(hardware.describe())
        on_gpu = torch.device(hardware.device).type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        rows, set_up = run_suites(
            gpu_suites() if on_gpu else cpu_suites(),
            hardware,
            dtype,
            only=only,
            rounds=rounds,
            report=lambda name: console.print(f"running {name}"),
            profile_dir=out if profile else None,
        )
    except Ch15Error as error:
        console.print(f"error: {error}")
        raise typer.Exit(1) from None
    print_rows(rows, set_up, console)
    if out is not None:
        result = {
            "hardware": hardware.block(),
            "commit": commit_id(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "set_up_s": dict(set_up),
            "rows": [{**asdict(r), "fraction": r.fraction, "ratio": r.ratio} for r in rows],
        }
        write_json_atomically(out / "engine.json", result)


if __name__ == "__main__":
    typer.run(main)
