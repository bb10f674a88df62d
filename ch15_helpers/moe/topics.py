"""Routing with experts that work together, as those of one language or one subject do.

Routers that are drawn expert by expert have popular experts but no company: where experts live then
changes nothing. Real routers have both.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.errors import MoEError


def route_topics(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    num_topics: int,
    *,
    mixed: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A batch whose tokens have a topic each, uniform; a topic's experts are alike in popularity.

    Args:
        num_topics: expert ``e`` belongs to topic ``e % num_topics``, so that an even placement
            separates the experts of a topic.
        mixed: share of tokens that choose among all experts.

    Returns:
        weights float32 and expert ids int64, [num_tokens, top_k].

    Raises:
        MoEError: a topic has fewer experts than ``top_k``, or not all have as many.
    """
    size, rest = divmod(num_experts, num_topics)
    if rest or size < top_k or not 0 <= mixed <= 1:
        raise MoEError(
            f"{num_topics} topics of {size} experts, top k {top_k}, mixed {mixed}; expected topics "
            "of equal size, with at least top k experts, and a share"
        )
    random = np.random.default_rng(seed)
    topic = random.integers(num_topics, size=(num_tokens, 1))
    of_topic = np.arange(num_experts)[None, :] % num_topics == topic
    keys = random.random((num_tokens, num_experts))
    eligible = of_topic | (random.random((num_tokens, 1)) < mixed)
    experts = np.argsort(np.where(eligible, keys, 2.0), axis=1, kind="stable")[:, :top_k]
    weights = random.random((num_tokens, top_k)) + 0.5
    weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(experts.astype(np.int64))
