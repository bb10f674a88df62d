"""Measures vLLM and FlashInfer on this machine, where they are installed, beside this book.

Run it with ``make peers``. Each peer is imported only here, and one that is not installed, or whose
interface is another than the versions named below have, is named with the reason and left out.
Written against FlashInfer 0.6 and vLLM 0.22; shapes, loads and the way of timing are ours.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from ch15_helpers.bench import engine, kernel_rows, kernels, moe, production, records
from ch15_helpers.bench.expectations import write_json_atomically
from ch15_helpers.bench.paths import runs_dir
from ch15_helpers.bench.records import Row
from ch15_helpers.errors import HardwareError
from ch15_helpers.hardware import HardwareProfile
from ch15_helpers.model.config import LLAMA3_8B

WORKSPACE_BYTES = 256 << 20
CONFIG_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
                 "rope_theta", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip


def flashinfer_rows(profile: HardwareProfile) -> list[Row]:
    """Paged decode attention with tensor cores, timed inside a graph like ours."""
    flashinfer = import_module("flashinfer")
    system = f"FlashInfer {version('flashinfer-python')}, tensor cores"
    device, rows = torch.device(profile.device), []
    cases = {case.name: case for case in kernels.gpu_cases() if case.kernel == "decode"}
    for name in records.ATTENTION:
        case = cases[name]
        counts = torch.tensor([-(-n // case.page) for n in case.context_lens], dtype=torch.int32)
        indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(device)
        last = torch.tensor([(n - 1) % case.page + 1 for n in case.context_lens])
        total = int(counts.sum())
        shape = (total, 2, case.page, case.kv_heads, case.head_dim)
        pages = [torch.randn(shape, device=device, dtype=torch.bfloat16)
                 for _ in range(kernel_rows.LAYERS)]  # fmt: skip
        q = torch.randn(len(counts), case.heads, case.head_dim, device=device, dtype=torch.bfloat16)
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            indptr,
            torch.randperm(total).int().to(device),
            last.int().to(device),
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.page,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )

        def call(turn: int, run: Any = wrapper.run, q: Any = q, pages: Any = pages) -> object:
            return run(q, pages[turn % kernel_rows.LAYERS])

        took_s = kernel_rows.time_s(call, device)
        rate = case.kv_bytes(torch.bfloat16) / took_s / 1e12
        rows.append(Row("attention", records.attention_work(name), "TB/s", system, rate))
    return rows


def vllm_expert_rows(profile: HardwareProfile) -> list[Row]:
    """vLLM's fused_experts on our inputs, eager calls one after another."""
    fused = import_module("vllm.model_executor.layers.fused_moe").fused_experts
    settings = import_module("vllm.config")
    device, rows = torch.device(profile.device), []
    with settings.set_current_vllm_config(settings.VllmConfig()), torch.inference_mode():
        for model, tokens in records.EXPERTS:
            inputs = moe.make_inputs(
                moe.MODELS[model], tokens, 8 if tokens <= 64 else 2, device, torch.bfloat16
            )
            turn = iter(range(10**9))

            def call(given: Any = inputs, turn: Iterator[int] = turn) -> object:
                x, gate_up, down, weights, ids = given[next(turn) % len(given)]
                return fused(x, gate_up, down, weights.float(), ids.int())

            took_s = moe.back_to_back_s(call, device, 30)
            work = records.expert_work(model, tokens)
            rows.append(Row("experts", work, "µs", _vllm(), took_s * 1e6))
    return rows


def vllm_engine_rows(profile: HardwareProfile) -> list[Row]:
    """vLLM's offline engine on our loads; each load runs once before it is timed."""
    vllm = import_module("vllm")
    with _config_directory() as directory:
        llm = vllm.LLM(
            model=str(directory),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_model_len=LLAMA3_8B.max_position_embeddings,
        )
    rows = []
    _, loads = production.peer_loads()
    for load in loads:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=load.outputs[0], ignore_eos=True, detokenize=False
        )
        ids = engine.random_prompts(load, LLAMA3_8B.vocab_size)
        prompts = [{"prompt_token_ids": each} for each in ids]
        times_s = []
        for _ in range(3):
            start_s = perf_counter()
            made = llm.generate(prompts, params, use_tqdm=False)
            times_s.append(perf_counter() - start_s)
        tokens = sum(len(output.outputs[0].token_ids) for output in made)
        if tokens != sum(load.outputs):
            raise ValueError(f"vLLM made {tokens} tokens of {sum(load.outputs)}")
        rows.append(Row("engine", load.name, load.unit, _vllm(), load.value(min(times_s[1:]))))
    return rows


PEERS: dict[str, Callable[[HardwareProfile], list[Row]]] = {
    "FlashInfer's decode attention": flashinfer_rows,
    "vLLM's experts": vllm_expert_rows,
    "vLLM's engine": vllm_engine_rows,
}


def measure_peers(profile: HardwareProfile) -> tuple[list[Row], list[str]]:
    """Rows of every peer that runs here, and a sentence for each that does not."""
    rows, left_out = [], []
    for name, measure in PEERS.items():
        try:
            rows += measure(profile)
        except ImportError as error:
            left_out.append(f"{name}: not installed ({error})")
        except Exception as error:  # a peer's other version must not cost the others' rows
            left_out.append(f"{name}: did not run ({type(error).__name__}: {error})")
        torch.cuda.empty_cache()
    return rows, left_out


def _vllm() -> str:
    return f"vLLM {version('vllm')}"


@contextlib.contextmanager
def _config_directory() -> Iterator[Path]:
    """A model directory with nothing but Llama-3-8B's configuration."""
    with tempfile.TemporaryDirectory() as name:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            **{field: getattr(LLAMA3_8B, field) for field in CONFIG_FIELDS},
        }
        Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(name)


def main(
    device: Annotated[str, typer.Option(help="The GPU: cuda or cuda:N.")] = "cuda",
    out: Annotated[str, typer.Option(help="Folder for the two records.")] = "",
) -> None:
    """Measure ours and theirs, and print the comparison."""
    profile = HardwareProfile.measure(device)
    if not profile.device.startswith("cuda"):
        raise HardwareError(
            "vLLM and FlashInfer need a GPU; on a CPU run python -m ch15_helpers.bench.peers"
        )
    folder = Path(out) if out else runs_dir() / "peers"
    theirs, left_out = measure_peers(profile)
    for sentence in left_out:
        print(f"left out: {sentence}")
    ours = production.measure_ours(profile)
    for name, rows in (("peers", theirs), ("ours", ours)):
        record = production.record_of(profile, rows)
        write_json_atomically(folder / f"{name}_{profile.key}.json", record.to_json())
    for group in records.GROUPS:
        print(production.table(production.compare(ours, theirs, group)))
    print(f"records: {folder}")


if __name__ == "__main__":
    typer.run(main)
