"""Fixtures that every test file may use. Models are loaded once a session."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer


@pytest.fixture(scope="session")
def device() -> str:
    """Where the models run: CH15_TEST_DEVICE, by default the CPU."""
    return os.environ.get("CH15_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def smollm2(device: str) -> Transformer:
    """SmolLM2-135M-Instruct, the real weights, float32."""
    return _load("smollm2", device)


@pytest.fixture(scope="session")
def tiny(device: str) -> Transformer:
    """Two dense layers with random weights, float32."""
    return _load("random:TINY", device)


@pytest.fixture(scope="session")
def tiny_moe(device: str) -> Transformer:
    """Two mixture-of-experts layers with random weights, float32."""
    return _load("random:TINY_MOE", device)


def _load(source: str, device: str) -> Transformer:
    import torch

    from ch15_helpers import load_model

    model: Transformer = load_model(source, device=device, dtype=torch.float32)
    return model
