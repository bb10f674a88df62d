"""Text to token ids and back, built from a GGUF file or a tokenizer.json, without transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ch15_helpers.errors import ModelLoadError
from ch15_helpers.model.gguf_file import GGUFFile

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
# What splits text before byte-level BPE, by `tokenizer.ggml.pre`; None is GPT-2's own pattern.
# SmolLM2's training also split runs of digits. No merge of its vocabulary joins digits, so that
# only matters for several spaces before a digit; transformers, and so vLLM, reads the file
# without that split, and we give the same ids as they do.
_PRE_TOKENIZERS: Mapping[str, str | None] = {
    "smollm": None,
    "gpt-2": None,
    "default": None,
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


class Tokenizer:
    """Encodes, decodes and renders chats.

    Attributes:
        bos_token_id, eos_token_id: or None where the model has none.
        vocab_size: number of tokens, added ones included.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_id: int | None,
        chat_template: str | None,
        add_bos: bool = False,
    ) -> None:
        self._backend = backend
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.chat_template = chat_template
        self.vocab_size = backend.get_vocab_size()
        self._add_bos = add_bos and bos_token_id is not None

    @classmethod
    def from_gguf(cls, source: GGUFFile | Path | str) -> Tokenizer | None:
        """Builds the byte-level BPE that a GGUF file holds.

        Returns:
            None, with a warning, where the file has no tokenizer or one of another kind
            (SentencePiece): such a model takes token ids only.

        Raises:
            ModelLoadError: the vocabulary is malformed, or its pre-tokenizer is unknown.
        """
        file = source if isinstance(source, GGUFFile) else GGUFFile(Path(source))
        metadata = file.metadata
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            warnings.warn(
                f"{file.path}: tokenizer {kind!r} is not byte-level BPE; pass token ids",
                stacklevel=2,
            )
            return None
        return cls(
            _build_bpe(metadata, file.path),
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
            chat_template=metadata.get("tokenizer.chat_template"),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        )

    @classmethod
    def from_hf_dir(cls, path: Path | str) -> Tokenizer:
        """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja if present.

        Raises:
            ModelLoadError: a file is missing or malformed.
        """
        from tokenizers import Tokenizer as Backend

        from ch15_helpers.model.hf_directory import read_json

        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise ModelLoadError(f"{path / 'tokenizer.json'}: no such file")
        try:
            backend = Backend.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the Rust binding raises bare Exception
            raise ModelLoadError(
                f"{path / 'tokenizer.json'}: not a tokenizer ({error}); download it again"
            ) from error
        config_path = path / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        template = config.get("chat_template")
        if (path / "chat_template.jinja").is_file():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(
            backend,
            bos_token_id=_token_id(backend, config.get("bos_token")),
            eos_token_id=_token_id(backend, config.get("eos_token")),
            chat_template=template if isinstance(template, str) else None,
        )

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written in the text become their ids.

        Args:
            add_special_tokens: add what the model's own post-processor adds, usually BOS.
        """
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._add_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return list(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a chat as the text that the model was trained on.

        Args:
            messages: ``{"role": ..., "content": ...}`` objects.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            ModelLoadError: the model has no chat template, or it rejects the messages.
        """
        if self.chat_template is None:
            raise ModelLoadError("this model has no chat template; pass plain text")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._token(self.bos_token_id),
                eos_token=self._token(self.eos_token_id),
            )
        except TemplateError as error:
            raise ModelLoadError(f"the chat template rejects these messages: {error}") from error

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else str(self._backend.id_to_token(token_id))


def _build_bpe(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ModelLoadError(
            f"{path}: pre-tokenizer {pre!r} is unknown; expected one of "
            f"{', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if not tokens or merges is None or types is None or len(types) != len(tokens):
        raise ModelLoadError(
            f"{path}: the tokenizer is incomplete; expected tokenizer.ggml.tokens, merges and "
            "token_type, the last as long as the first"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    except Exception as error:  # the Rust binding raises bare Exception
        raise ModelLoadError(f"{path}: malformed tokenizer merges ({error})") from error
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        use_regex=_PRE_TOKENIZERS[pre] is None,
    )
    pattern = _PRE_TOKENIZERS[pre]
    if pattern is None:
        backend.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(t, normalized=False, special=True) for t, kind in
               zip(tokens, types, strict=True) if kind == _CONTROL]  # fmt: skip
    plain = [AddedToken(t, normalized=False, special=False) for t, kind in
             zip(tokens, types, strict=True) if kind == _USER_DEFINED]  # fmt: skip
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    return backend


def _token_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None
