"""A small random model with a tokenizer, and engines that say what the test wants."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.documents import END_OF_TEXT
from bitskip_ref.exits.fixed import FixedExit
from bitskip_ref.folder import write_folder
from tests.helpers import random_tensors

CORPUS = ["Once upon a time there was a little cat.", "Über den Wölken 😀 日本語", "the cat sat"]
CONFIG = small_twin("bitskip-v1").replace(vocab_size=320, gates=True)


def byte_level_bpe(size: int = 300) -> str:
    """A tokenizer.json like the trainer's, learned from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def write_model(path: Path, config: ModelConfig = CONFIG, **options: Any) -> Path:
    """A random model folder with a tokenizer."""
    options = {"tokenizer_json": byte_level_bpe(), "eos_token_id": 0, **options}
    write_folder(path, config, random_tensors(config), **options)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to read; tests that change one make their own."""
    return write_model(tmp_path_factory.mktemp("model") / "random")


class ScriptEngine:
    """Predicts the given tokens one after the other, whatever it is fed, at the given depths."""

    threads, kv_cache = 1, "float32"
    extend_exits = step_many = speculate = speculate_many = round = None

    def __init__(self, config: ModelConfig, script: list[int], depths: list[int] | None = None):
        self.config, self.script, self.depths = config, script, depths or []
        self.fed: list[int] = []

    def beside(self) -> list[Any]:
        return [self]

    def new_cache(self) -> Any:
        context = self.config.max_position_embeddings

        class Cache:
            length, room = 0, context

        return Cache()

    def _say(self, index: int) -> np.ndarray:
        z = np.zeros(self.config.vocab_size, np.float32)
        z[self.script[min(index, len(self.script) - 1)]] = 1
        return z

    def extend(self, token_ids: Any, cache: Any, **_: Any) -> np.ndarray:
        cache.length += len(token_ids)
        self.prompt, self.fed = list(token_ids), []
        return self._say(0)[None]

    def step(self, token_id: int, cache: Any, rule: Any, trace: Any = None, **_: Any) -> Any:
        cache.length += 1
        self.fed.append(token_id)
        depth = self.depths[len(self.fed) - 1] if self.depths else 1
        return self._say(len(self.fed)), depth

    def choose(self, logits: Any, sampler: Any, seen: Any, index: int) -> int:
        return int(sampler.choose(logits, seen, index))

    def step_on(
        self, token_id: int, cache: Any, count: int, choice: Any, *, exit_layer: int, **_: Any
    ) -> Any:
        return [], self.step(token_id, cache, FixedExit(exit_layer))[0]  # none more in a call

    def logits(self, token_ids: Any, exit_layer: int | None = None) -> np.ndarray:
        return np.stack([self._say(i) for i in range(len(token_ids))])


class UniformEngine(ScriptEngine):
    """Every token is as likely as any other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, [0])

    def _say(self, index: int) -> np.ndarray:
        return np.full(self.config.vocab_size, 2.5, np.float32)

    def extend_exits(self, token_ids: Any, cache: Any, exit_layers: Any, visit: Any) -> None:
        for n in exit_layers:
            visit(n, 0, self.logits(token_ids))


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `bitskip-cpu` as a process of its own."""
    words = [a if isinstance(a, bytes) else str(a) for a in arguments]
    return subprocess.run(
        [sys.executable, "-m", "bitskip_cpu", *words],
        capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Kernels are ready, so that no test sees the message about the first time."""
    from bitskip_cpu.compiling import warmup

    warmup()
