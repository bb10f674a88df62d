"""Our engine beside transformers' ``generate``, interleaved, same weights and same tokens.

Run it with ``python -m ch15_helpers.bench.peers``. transformers (and accelerate, which it needs
to read a GGUF file) come with the ``test`` extra; the book itself does not need them. Prompts in a
batch have equal lengths, so that transformers needs no padding, its best case.

Both sides run in each dtype, ours with the weights as they were loaded (``rows``, where it is
float32), in the layout that ``load_model`` chooses and in the one that was measured to be fastest,
all in the same rounds. A row compares like with like: float32 with float32, bfloat16 with bfloat16.
The last row of a workload holds our fastest float32 layout, whose tokens are exact, against
whatever dtype is transformers' fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ch15_helpers.bench.timing import PairTiming, Samples, interleave, pair_from_samples
from ch15_helpers.errors import Ch15Error
from ch15_helpers.model.cpu_weights import FASTEST, choose_layout
from ch15_helpers.model.loading import find_smollm2, load_model, resolve_device
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.request import SamplingParams

if TYPE_CHECKING:
    from ch15_helpers.model.tokenizer import Tokenizer

TEXT = """The first telescopes were made of two lenses in a tube. In 1609 Galileo pointed one at the
moon and saw mountains, then at Jupiter and saw four small points that changed places from night to
night. He concluded that they went around the planet. Larger lenses showed more, but each colour
came to a focus at a different distance, and the image had coloured edges. Newton therefore built a
telescope with a mirror, which sends all colours to the same place. Today the largest mirrors are
made of many small ones, each of which is moved by motors so that together they act as one."""
EXACT, BEST = "float32", "best"
# Different kernels round differently, so a near tie may flip one id and every id after it. That
# is rare in float32 and common in bfloat16, whose logits have 8 bits: of 64 ids, the first 20 or
# 30 were seen to agree. Two different models agree on hardly anything.
MIN_SAME = {"float32": 0.9, "bfloat16": 0.15}

# Prompts and a number of new tokens in, the new ids of each prompt out.
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Side:
    """One way to run the model: ours with a layout, transformers' without."""

    dtype: str
    layout: str
    generate: Generate


@dataclass(frozen=True)
class Workload:
    """Prompts of equal length, new tokens for each, and how many tokens count for the rate."""

    name: str
    prompts: list[list[int]]
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Generated ids; of a prefill, the prompt's."""
        count = self.new_tokens if self.new_tokens > 1 else len(self.prompts[0])
        return len(self.prompts) * count


@dataclass(frozen=True)
class PeerRow:
    """One comparison: ``timing.speedup`` is transformers' time over ours.

    ``same_tokens`` is the share of ids that equal transformers' of our dtype.
    """

    workload: Workload
    theirs: Side
    ours: Side
    timing: PairTiming
    same_tokens: float
    kind: str

    @property
    def problem(self) -> str | None:
        """Why this row is a failure, or None."""
        if self.same_tokens < MIN_SAME[self.ours.dtype]:
            return f"{self.workload.name}, {self.ours.dtype}: {self.same_tokens:.0%} same tokens"
        if self.timing.speedup <= 1:
            return f"{self.workload.name}, {self.kind}: not ahead"
        return None


def load_transformers(device: str, dtype: torch.dtype) -> Any:
    """SmolLM2 in transformers, from the same GGUF file that our loader reads."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise Ch15Error(
            "transformers is not installed; this comparison needs the test extra: "
            "pip install -e '.[test]'"
        ) from error
    path = find_smollm2()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.to(device).eval()


def text_prompts(tokenizer: Tokenizer, num: int, length: int) -> list[list[int]]:
    """``num`` different windows of ``length`` tokens of one text, repeated as often as needed."""
    ids = tokenizer.encode(TEXT)
    ids = ids * (1 + (length + num * len(ids)) // len(ids))
    return [ids[5 * start : 5 * start + length] for start in range(num)]


def workloads(tokenizer: Tokenizer, batches: Sequence[int], prefill: int) -> list[Workload]:
    """Decode at each batch size (16 tokens in, 64 out), then a prefill of one prompt."""
    decodes = [Workload(f"decode, batch {b}", text_prompts(tokenizer, b, 16), 64) for b in batches]
    name = f"prefill, {prefill} tokens"
    return [*decodes, Workload(name, text_prompts(tokenizer, 1, prefill), 1)]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of positions at which both generated the same id."""
    pairs = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def our_sides(device: str, dtypes: Sequence[str], max_num_seqs: int) -> tuple[list[Side], Any]:
    """An engine for each dtype and layout that is compared, and the tokenizer."""
    on_cpu = resolve_device(device).type == "cpu"
    sides, tokenizer = [], None
    for dtype in dtypes:
        layouts = ["rows"] if dtype == EXACT or not on_cpu else []
        if on_cpu:
            layouts += (choose_layout(getattr(torch, dtype), how) for how in (None, FASTEST))
        for layout in dict.fromkeys(layouts):
            model = load_model("smollm2", device, dtype, cpu_layout=layout)
            tokenizer = model.tokenizer
            engine = Engine(model, EngineConfig(max_num_seqs=max_num_seqs))
            sides.append(Side(dtype, layout, partial(_generate, engine)))
    return sides, tokenizer


def _generate(engine: Engine, prompts: list[list[int]], out: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    return [output.token_ids for output in engine.generate(prompts, params)]


def peer_sides(device: str, dtypes: Sequence[str]) -> list[Side]:
    """transformers in each dtype: greedy, no end-of-sequence, its default attention and cache."""

    @torch.inference_mode()
    def generate(peer: Any, prompts: list[list[int]], out: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=peer.device)
        mask = torch.ones_like(ids)
        made = peer.generate(
            ids, attention_mask=mask, max_new_tokens=out, min_new_tokens=out, do_sample=False
        )
        rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return rows

    where = str(resolve_device(device))
    return [
        Side(dtype, "", partial(generate, load_transformers(where, getattr(torch, dtype))))
        for dtype in dtypes
    ]


def compare(
    work: Workload, ours: Sequence[Side], theirs: Sequence[Side], rounds: int
) -> Iterator[PeerRow]:
    """All sides on one workload, interleaved: a row for each of ours, then the best of each."""
    ids = {side: side.generate(work.prompts, work.new_tokens) for side in (*theirs, *ours)}
    names = {side: f"{'theirs' if side in theirs else 'ours'} {n}" for n, side in enumerate(ids)}
    timed = interleave(
        {name: partial(s.generate, work.prompts, work.new_tokens) for s, name in names.items()},
        iterations=rounds,
        warmup=1,
    )
    times: Mapping[Side, Samples] = {side: timed[name] for side, name in names.items()}
    peer_of = {side.dtype: side for side in theirs}
    same = {side: agreement(ids[side], ids[peer_of[side.dtype]]) for side in ours}

    def row(side: Side, peer: Side, kind: str) -> PeerRow:
        timing = pair_from_samples(times[peer], times[side])
        return PeerRow(work, peer, side, timing, same[side], kind)

    yield from (row(side, peer_of[side.dtype], side.dtype) for side in ours)
    exact = [side for side in ours if side.dtype == EXACT]
    if exact:
        quickest = min(exact, key=lambda side: times[side].median_s)
        yield row(quickest, min(theirs, key=lambda side: times[side].median_s), BEST)


def problems(rows: Sequence[PeerRow]) -> list[str]:
    """What makes the comparison fail: other tokens, or a workload and dtype without a lead.

    Of several layouts the fastest counts, since a user may choose it.
    """
    found = [row.problem for row in rows if row.same_tokens < MIN_SAME[row.ours.dtype]]
    best: dict[tuple[str, str], PeerRow] = {}
    for row in rows:
        key = row.workload.name, row.kind
        if key not in best or row.timing.speedup > best[key].timing.speedup:
            best[key] = row
    found += [row.problem for row in best.values()]
    return sorted({text for text in found if text})


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1,4,16,32",
    prefill: Annotated[int, typer.Option(help="Prompt length of the prefill row.")] = 512,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtypes: Annotated[str, typer.Option(help="Dtypes, by commas.")] = "float32,bfloat16",
) -> None:
    """Compare SmolLM2 with transformers in each dtype, and fail where it is not ahead."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    kinds, sizes = dtypes.split(","), [int(size) for size in batches.split(",")]
    ours, tokenizer = our_sides(device, kinds, max(sizes))
    theirs = peer_sides(device, kinds)
    rows: list[PeerRow] = []
    for work in track(workloads(tokenizer, sizes, prefill), description="comparing"):
        rows += compare(work, ours, theirs, rounds)
    table = Table("work", "theirs", "tok/s", "ours", "tok/s", "ratio", "interval", "same tokens")
    for row in rows:
        timing, tokens = row.timing, row.workload.tokens
        table.add_row(
            row.workload.name,
            row.theirs.dtype,
            f"{tokens / timing.baseline.median_s:.1f}",
            f"{row.ours.dtype} {row.ours.layout}",
            f"{tokens / timing.optimised.median_s:.1f}",
            f"{timing.speedup:.2f}",
            f"{timing.speedup_low:.2f}–{timing.speedup_high:.2f}",
            f"{row.same_tokens:.1%}",
            end_section=row.kind == BEST,
        )
    console = Console(width=110)
    console.print(table)
    failed = problems(rows)
    for text in failed:
        console.print(text)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
