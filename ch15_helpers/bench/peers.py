"""Our engine beside transformers' ``generate``, interleaved, same weights and same tokens.

Run it with ``python -m ch15_helpers.bench.peers``. transformers (and accelerate, which it needs
to read a GGUF file) come with the ``test`` extra; the book itself does not need them. Prompts in a
batch have equal lengths, so that transformers needs no padding, its best case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ch15_helpers.bench.timing import PairTiming, measure_pair
from ch15_helpers.errors import Ch15Error
from ch15_helpers.model.loading import find_smollm2, load_model
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.request import SamplingParams

if TYPE_CHECKING:
    from ch15_helpers.model.tokenizer import Tokenizer
    from ch15_helpers.model.transformer import Transformer

TEXT = """The first telescopes were made of two lenses in a tube. In 1609 Galileo pointed one at the
moon and saw mountains, then at Jupiter and saw four small points that changed places from night to
night. He concluded that they went around the planet. Larger lenses showed more, but each colour
came to a focus at a different distance, and the image had coloured edges. Newton therefore built a
telescope with a mirror, which sends all colours to the same place. Today the largest mirrors are
made of many small ones, each of which is moved by motors so that together they act as one."""


@dataclass(frozen=True)
class PeerRow:
    """One workload: ``timing.speedup`` is transformers' time over ours.

    ``same_tokens`` is the share of generated ids on which both agree. Different kernels round
    differently, so a near tie may flip one id and every id after it; anything under 0.9 means
    that the two do not run the same model.
    """

    workload: str
    tokens: int
    timing: PairTiming
    same_tokens: float


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


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of positions at which both generated the same id."""
    pairs = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def _compare(
    workload: str, ours: Callable[[], Any], theirs: Callable[[], Any], tokens: int, rounds: int
) -> PeerRow:
    same = agreement(ours(), theirs())
    timing = measure_pair(theirs, ours, iterations=rounds, warmup=1)
    return PeerRow(workload, tokens, timing, same)


def compare_with_transformers(
    model: Transformer, peer: Any, batches: Sequence[int], prefill: int, rounds: int
) -> list[PeerRow]:
    """Decode at each batch size (16 tokens in, 64 out), then a prefill of one prompt.

    Both sides use the same device, type and thread count, greedy choice, no end-of-sequence.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None, "SmolLM2 comes with its tokenizer"
    engine = Engine(model, EngineConfig(max_num_seqs=max(batches)))

    def run(prompts: list[list[int]], out: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=out, ignore_eos=True)
        return [output.token_ids for output in engine.generate(prompts, params)]

    @torch.inference_mode()
    def run_peer(prompts: list[list[int]], out: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=peer.device)
        made = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=out,
            min_new_tokens=out,
            do_sample=False,
        )
        rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return rows

    cases = [(f"decode, batch {b}", b, 16, 64) for b in batches]
    cases.append((f"prefill, {prefill} tokens", 1, prefill, 1))
    rows = []
    for name, batch, length, out in cases:
        prompts = text_prompts(tokenizer, batch, length)
        tokens = batch * out if out > 1 else length
        rows.append(
            _compare(
                name,
                lambda p=prompts, n=out: run(p, n),  # type: ignore[misc]
                lambda p=prompts, n=out: run_peer(p, n),  # type: ignore[misc]
                tokens,
                rounds,
            )
        )
    return rows


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4,16",
    prefill: Annotated[int, typer.Option(help="Prompt length of the prefill row.")] = 512,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Compare SmolLM2 in float32 with transformers, and fail where it is not ahead."""
    from rich.console import Console
    from rich.table import Table

    model = load_model("smollm2", device=device, dtype=torch.float32)
    peer = load_transformers(str(model.device), torch.float32)
    sizes = [int(size) for size in batches.split(",")]
    rows = compare_with_transformers(model, peer, sizes, prefill, rounds)
    table = Table("work", "transformers tok/s", "ours tok/s", "ratio", "interval", "same tokens")
    for row in rows:
        timing = row.timing
        table.add_row(
            row.workload,
            f"{row.tokens / timing.baseline.median_s:.1f}",
            f"{row.tokens / timing.optimised.median_s:.1f}",
            f"{timing.speedup:.2f}",
            f"{timing.speedup_low:.2f}–{timing.speedup_high:.2f}",
            f"{row.same_tokens:.1%}",
        )
    Console(width=100).print(table)
    if any(row.timing.speedup <= 1 or row.same_tokens < 0.9 for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
