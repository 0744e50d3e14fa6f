"""The four public ways to load one folder give the same bits, on the shipped, trained weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bitskip_cpu
import bitskip_ref
from bitskip_cpu import models
from bitskip_ref.compare import difference

PROMPT = "Once upon a time, there was a little"


def _torch(path: Any) -> Any:
    return pytest.importorskip("bitskip_train").load_exported(path)


def _onnx(path: Any) -> Any:
    return pytest.importorskip("bitskip_export").load_onnx(path)


ENGINES: dict[str, Callable[[Any], Any]] = {
    "numba": bitskip_cpu.load,
    "torch": _torch,
    "onnx": _onnx,
}


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    ids: list[int] = bitskip_cpu.load(models.path()).tokenizer.encode(PROMPT)
    assert len(ids) >= 6
    return ids


@pytest.fixture(scope="module")
def expected(prompt: list[int]) -> dict[int | None, np.ndarray]:
    reference = bitskip_ref.load(models.path())
    return {n: reference.logits(prompt, n) for n in (1, 18, None)}


@pytest.mark.parametrize("name", ENGINES)
def test_logits_of_the_shipped_model(
    name: str, prompt: list[int], expected: dict[int | None, np.ndarray]
) -> None:
    engine = ENGINES[name](models.path())
    for exit_layer, logits in expected.items():
        actual = engine.logits(prompt, exit_layer)
        assert actual.shape == (len(prompt), engine.config.vocab_size)
        report = difference(f"{name}, exit {exit_layer}", logits, actual)
        assert report is None, report


def test_the_shipped_model_tells_a_story() -> None:
    """At exit 18 and at full depth: words of the training text, spelt and ended as sentences."""
    model = bitskip_cpu.load("stories-24")
    for exit_layer in (18, 24):
        text = model.generate("Once upon a time", max_tokens=60, exit_layer=exit_layer).text
        words = text.replace(",", " ").replace(".", " ").split()
        assert len(words) >= 30 and "." in text
        assert {"the", "a", "to", "was"} & set(words)
        assert all(word.isascii() for word in words)
