"""Bad input, failing steps and interrupts: one request suffers, or nothing starts."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fakes import VOCAB, HashModel, expected_tokens, next_token

from ch15_helpers import (
    CapacityError,
    Engine,
    EngineConfig,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
)
from ch15_helpers.model.config import LLAMA3_8B
from ch15_helpers.serving.memory import activation_bytes, pool_size, throughput_tokens

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer


def hash_engine(model: HashModel | None = None, **config: Any) -> Engine:
    ticks = itertools.count()
    settings = {"block_size": 4, "num_blocks": 16, "watermark": 0.0, **config}
    return Engine(
        model or HashModel(),  # type: ignore[arg-type]
        EngineConfig(**settings),
        clock=lambda: float(next(ticks)),
    )


def drain(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    return outputs


def still_works(engine: Engine) -> None:
    (output,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    assert output.token_ids == expected_tokens([1, 2, 3], 5)
    engine.check_invariants()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the list of prompts is empty"),
        ("just text", "must be a list of prompts"),
        (7, "must be a list of prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, VOCAB]], f"prompt 0 has the token id {VOCAB}; ids are whole numbers in 0..96"),
        ([[-1]], "token id -1"),
        ([[1, "two"]], "token id 'two'"),
        ([[1.5]], "token id 1.5"),
        ([[True]], "token id True"),
        ([[1], 5], "prompt 1 is a int"),
        ([b"bytes"], "prompt 0 is a bytes"),
        ([None], "prompt 0 is a NoneType"),
        (["text"], "no tokenizer"),
    ],
)
def test_bad_prompts_are_refused_before_anything_starts(prompts: Any, message: str) -> None:
    engine = hash_engine()
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(prompts)
    assert not engine.has_unfinished and engine.num_steps == 0
    still_works(engine)


def test_text_that_encodes_to_nothing_is_refused(smollm2: Transformer) -> None:
    engine = Engine(smollm2, EngineConfig(num_blocks=4))
    with pytest.raises(InvalidRequestError, match="prompt 1 is empty"):
        engine.generate(["fine", ""])
    assert not engine.has_unfinished


def test_params_must_match_the_prompts() -> None:
    engine = hash_engine()
    with pytest.raises(InvalidRequestError, match="2 prompts came with 1 SamplingParams"):
        engine.generate([[1], [2]], [SamplingParams()])
    each = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=4)]
    assert [len(o.token_ids) for o in engine.generate([[1], [2]], each)] == [2, 4]
    assert len(engine.generate([[1]])[0].token_ids) == SamplingParams().max_tokens


def test_a_prompt_larger_than_the_pool_is_rejected_alone() -> None:
    engine = hash_engine(num_blocks=5)
    prompts = [[1, 2], list(range(21)), [3]]
    first, large, last = engine.generate(prompts, SamplingParams(max_tokens=3))
    assert large.finish_reason == "error" and large.token_ids == [] and large.text == ""
    assert large.error is not None
    assert "needs 6 KV blocks" in large.error and "the pool has 5" in large.error
    assert large.metrics.ttft_s is None and large.metrics.itl_s == []
    assert first.token_ids == expected_tokens([1, 2], 3)
    assert last.token_ids == expected_tokens([3], 3)


def test_a_prompt_longer_than_the_model_is_rejected_alone() -> None:
    engine = hash_engine(HashModel(max_position_embeddings=30))
    long, fine = engine.generate([[1] * 31, [1] * 30], SamplingParams(max_tokens=9))
    assert long.error == "the prompt has 31 tokens, the model's context is 30 tokens"
    assert fine.token_ids == expected_tokens([1] * 30, 1)
    shorter = hash_engine(max_model_len=8)
    assert shorter.generate([[1] * 6], SamplingParams(max_tokens=9))[0].finish_reason == "length"
    assert "context is 8" in str(shorter.generate([[1] * 9])[0].error)


def test_a_request_that_outgrows_the_pool_keeps_its_tokens() -> None:
    engine = hash_engine(num_blocks=3)
    (output,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=100))
    assert output.finish_reason == "error" and "needs 4 KV blocks" in str(output.error)
    assert output.token_ids == expected_tokens([1, 2, 3], 10)  # 13 tokens do not fit
    still_works(engine)


@pytest.mark.parametrize("config", [{}, {"preemption": "swap", "num_host_blocks": 9}], ids=str)
def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(config: dict[str, Any]) -> None:
    model = HashModel()
    engine = hash_engine(model, max_num_seqs=2, **config)
    names = [engine.add_request([i, i + 1], SamplingParams(max_tokens=6)) for i in range(4)]
    engine.step()
    model.failures = 1
    ended = engine.step()
    engine.check_invariants()
    assert [output.request_id for output in ended] == names[:2]
    for output in ended:
        assert output.error == "the model step failed: RuntimeError: injected failure"
        assert output.finish_reason == "error" and len(output.token_ids) == 1
    rest = drain(engine)
    assert {name: rest[name].token_ids for name in names[2:]} == {
        name: expected_tokens([i, i + 1], 6) for i, name in enumerate(names) if i >= 2
    }
    still_works(engine)


def test_generate_survives_a_failing_step() -> None:
    model = HashModel()
    model.failures = 1
    engine = hash_engine(model, max_num_seqs=1)
    bad, good = engine.generate([[1], [2]], SamplingParams(max_tokens=3))
    assert bad.finish_reason == "error" and good.token_ids == expected_tokens([2], 3)


def test_logits_that_are_not_finite_end_one_request() -> None:
    model = HashModel()
    engine = hash_engine(model)
    prompts = [[1, 2, 3], [4, 5, 6], [7]]
    answers = [expected_tokens(prompt, 6) for prompt in prompts]
    model.nan_for = answers[1][3]
    assert all(model.nan_for not in answers[i] for i in (0, 2))
    first, bad, last = engine.generate(prompts, SamplingParams(max_tokens=6))
    assert bad.finish_reason == "error" and "not finite" in str(bad.error)
    assert bad.token_ids == answers[1][:3]
    assert [first.token_ids, last.token_ids] == [answers[0], answers[2]]


def test_abort_frees_and_hands_out_what_there_is() -> None:
    engine = hash_engine()
    running = engine.add_request([1, 2], SamplingParams(max_tokens=50))
    engine.step()
    engine.step()
    assert engine.abort(running) and not engine.abort(running) and not engine.abort("nobody")
    assert engine.has_unfinished
    (output,) = engine.step()
    assert output.finish_reason == "abort" and output.token_ids == expected_tokens([1, 2], 2)
    assert not engine.has_unfinished and engine.scheduler.blocks.allocator.num_used == 0


def test_an_interrupt_leaves_nothing_behind_and_loses_nothing_of_others() -> None:
    class Interrupted(HashModel):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(*args, **kwargs)

    engine = hash_engine(Interrupted(), max_num_seqs=1)
    mine = engine.add_request([9], SamplingParams(max_tokens=2))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9))
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    (output,) = engine.step()
    assert output.request_id == mine and output.token_ids == expected_tokens([9], 2)
    still_works(engine)


def test_generate_serves_requests_that_were_added_before() -> None:
    engine = hash_engine()
    other = engine.add_request([5], SamplingParams(max_tokens=1))
    (mine,) = engine.generate([[6]], SamplingParams(max_tokens=8))
    assert mine.token_ids == expected_tokens([6], 8)
    (output,) = engine.step()
    assert output.request_id == other and output.token_ids == [next_token([5])]


def test_taken_id_and_unknown_parent_are_refused() -> None:
    engine = hash_engine()
    engine.add_request([1], request_id="mine")
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        engine.add_request([1], request_id="mine")
    with pytest.raises(InvalidRequestError, match="no unfinished request 'other'"):
        engine.fork("other")
    drain(engine)


def test_times_come_from_the_injected_clock() -> None:
    engine = hash_engine()
    name = engine.add_request([1, 2], SamplingParams(max_tokens=3), arrival_s=-10.0)
    metrics = drain(engine)[name].metrics
    # Ticks: a step reads the clock when it starts (even), when scheduled and when it ran.
    assert metrics.queue_s == 10.0 and metrics.ttft_s == 12.0
    assert metrics.itl_s == [3.0, 3.0] and metrics.tpot_s == 3.0 and metrics.e2e_s == 18.0


def test_steps_can_be_watched() -> None:
    records: list[Any] = []
    engine = hash_engine(max_num_batched_tokens=4)
    engine.on_step = records.append
    engine.generate([[1] * 6, [2]], SamplingParams(max_tokens=2))
    assert [record.num_tokens for record in records] == [4, 3, 2]
    assert [record.index for record in records] == [0, 1, 2] and engine.num_steps == 3
    assert [len(record.step.decodes) for record in records] == [0, 0, 2]
    assert all(record.end_s - record.start_s == 2.0 for record in records)
    assert records[0].num_waiting == 1 and records[-1].num_free_blocks == 16


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    engine = hash_engine()
    engine.generate([[1]], SamplingParams(max_tokens=1))
    assert capsys.readouterr().out == ""
    engine.generate([[1]], SamplingParams(max_tokens=1), progress=True)
    assert "generating" in capsys.readouterr().out


def test_pool_is_sized_from_memory_but_not_beyond_use(monkeypatch: pytest.MonkeyPatch) -> None:
    config = HashModel(max_position_embeddings=100).config
    device = torch.device("cpu")
    engine_config = EngineConfig(block_size=8, max_num_seqs=3)
    assert pool_size(config, engine_config, device, torch.float32) == 3 * 13
    short = replace(engine_config, max_model_len=16)
    assert pool_size(config, short, device, torch.float32) == 3 * 2
    block = 2 * 2 * 8 * 4  # K and V, head_dim 2, 8 tokens, float32
    monkeypatch.setattr("ch15_helpers.serving.memory._available_bytes", lambda: 4 * 7 * block)
    assert pool_size(config, engine_config, device, torch.float32) == 7
    monkeypatch.setattr("ch15_helpers.serving.memory._available_bytes", lambda: block)
    with pytest.raises(CapacityError, match="one block of 8 tokens takes"):
        Engine(HashModel(), engine_config)  # type: ignore[arg-type]


def test_activations_are_counted_in_the_budget() -> None:
    config = HashModel().config
    small = activation_bytes(config, EngineConfig(max_num_batched_tokens=256), torch.bfloat16)
    large = activation_bytes(config, EngineConfig(max_num_batched_tokens=4096), torch.bfloat16)
    assert large > 10 * small


@pytest.mark.parametrize(
    ("memory_gib", "least", "tokens"), [(140, 2048, 8448), (16, 1024, 2112), (1, 512, 512)]
)
def test_a_budget_for_throughput_fills_whole_waves(
    monkeypatch: pytest.MonkeyPatch, memory_gib: int, least: int, tokens: int
) -> None:
    memory = "ch15_helpers.serving.memory"
    monkeypatch.setattr(f"{memory}.num_processors", lambda device: 132)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, memory_gib << 30))
    config = EngineConfig(max_num_batched_tokens=least, max_num_seqs=4)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    found = throughput_tokens(LLAMA3_8B, config, gpu, torch.bfloat16)
    assert found == tokens
    for width in (4096, 6144, 14336, 28672) if found > least else ():
        assert found // 64 * (width // 128) % (132 * 4) == 0  # quarters of tiles of 256 tokens
    assert throughput_tokens(LLAMA3_8B, config, cpu, torch.bfloat16) == least


def test_import_is_lazy() -> None:
    code = (
        "import sys, ch15_helpers; assert 'torch' not in sys.modules; "
        "from ch15_helpers.serving.scheduler import Scheduler; assert 'torch' not in sys.modules; "
        "assert 'Engine' in dir(ch15_helpers); from ch15_helpers import Engine; "
        "assert 'torch' in sys.modules; assert Engine.__name__ == 'Engine'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import ch15_helpers

    for name in ch15_helpers.__all__:
        assert getattr(ch15_helpers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ch15_helpers.nothing
