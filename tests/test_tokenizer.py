"""Our tokenizer, built from the GGUF without transformers, gives transformers' ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.loading import find_smollm2
from ch15_helpers.model.tokenizer import Tokenizer

CORPUS = [
    "",
    " ",
    "  leading and   inner    spaces  ",
    "tabs\tand\nnewlines\r\n\n\n",
    "numbers 1 12 123 1234567 3.14159 1,000,000 0x1F 2026-11-24",
    "  7   8  9",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    '{"key": [1, 2.5, null], "other": "\\u00e9"}',
    "naïve café, Übergröße, ça va, ¿qué?",
    "日本語のテキスト 中文 한국어 العربية עברית ไทย",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 ½ ² ٣ Ⅷ",
    "it's I'll you're WE'VE they'd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "not special: <|im_ <|im_start| > <im_start>",
    "\x00\x01\x7f\u200b\ufeff\u2028",
    "e\u0301 versus \u00e9",
]
PIECES = st.sampled_from(
    ["    ", "\n", "\t", "12345", " 0.5", "for i in range(10):", "<|im_start|>", "<|im_end|>",
     "'s", "'LL", " the", "THE", "naïve", "日本", "🙂", "_", "==", "\\", "½", "\u00a0", "<", "|"]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=" \t\n0123456789.,abc", max_size=40),
    st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=12).map("".join),
)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    tokenizer = Tokenizer.from_gguf(find_smollm2())
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    path = find_smollm2()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", CORPUS)
def test_same_ids_on_corpus(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS)
def test_same_ids_on_fuzzed_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    # Not compared with the text: the vocabulary lacks a few control bytes, which encode to nothing.
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=20))
def test_same_text_of_any_ids(ours: Tokenizer, theirs: Any, ids: list[int]) -> None:
    """Ids in any order may hold broken UTF-8."""
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=30)),
        min_size=1,
        max_size=5,
    ),
    prompt=st.booleans(),
)
def test_same_chat(
    ours: Tokenizer, theirs: Any, turns: list[tuple[str, str]], prompt: bool
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert ours.apply_chat_template(messages, prompt) == text
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_special_ids(ours: Tokenizer, theirs: Any) -> None:
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == 49152
    assert ours.encode("<|im_end|>") == [2]
    assert ours.decode([2, 33], skip_special_tokens=True) == ours.decode([33])


def test_hf_directory_round_trip(ours: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    """What transformers saves, we read back with the same ids, special tokens and template."""
    theirs.save_pretrained(tmp_path)
    loaded = Tokenizer.from_hf_dir(tmp_path)
    for text in CORPUS:
        assert loaded.encode(text) == ours.encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(messages) == ours.apply_chat_template(messages)


def test_errors(ours: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_hf_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_hf_dir(tmp_path)
    bare = Tokenizer(ours._backend, bos_token_id=None, eos_token_id=None, chat_template=None)
    with pytest.raises(ModelLoadError, match="no chat template"):
        bare.apply_chat_template([])
    refusing = "{{ raise_exception('roles must alternate') }}"
    strict = Tokenizer(ours._backend, bos_token_id=1, eos_token_id=2, chat_template=refusing)
    with pytest.raises(ModelLoadError, match="roles must alternate"):
        strict.apply_chat_template([{"role": "user", "content": "x"}])
