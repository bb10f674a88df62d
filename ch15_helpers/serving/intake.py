"""What a caller hands in, checked: prompts become token ids, parameters one for each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.request import SamplingParams

Prompt = str | list[int] | tuple[int, ...]


def params_for(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """One SamplingParams for each of ``count`` prompts.

    Raises:
        InvalidRequestError: a list of another length.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{count} prompts came with {len(params)} SamplingParams; give one for all or one "
            "for each"
        )
    return list(params)


def encode(model: Transformer, prompt: Prompt, what: str) -> list[int]:
    """Token ids of a prompt, which the messages call ``what``.

    Raises:
        InvalidRequestError: it is empty, has ids that the model does not know, or is text and the
            model has no tokenizer.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InvalidRequestError(
                f"{what} is text, but the model {model.source!r} has no tokenizer; give token ids"
            )
        token_ids = model.tokenizer.encode(prompt)
    elif isinstance(prompt, list | tuple):
        token_ids = list(prompt)
    else:
        raise InvalidRequestError(
            f"{what} is a {type(prompt).__name__}; it must be a string or a list of token ids"
        )
    if not token_ids:
        raise InvalidRequestError(f"{what} is empty; it needs at least one token")
    vocab = model.config.vocab_size
    for token in token_ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
            raise InvalidRequestError(
                f"{what} has the token id {token!r}; ids are whole numbers in 0..{vocab - 1}"
            )
    return token_ids
