"""A small model, a little text and a trainer on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitskip_ref.config import ModelConfig, small_twin
from bitskip_train.data import Split
from bitskip_train.settings import TrainConfig
from bitskip_train.trainer import Trainer

NAMES = ["Lily", "Tom", "Mia", "Ben"]
THINGS = ["a red ball", "a big dog", "the old tree", "her mother"]


def stories(count: int = 40) -> str:
    """Documents of a few repeated sentences, separated as in TinyStories."""
    lines = [
        f"{NAMES[i % 4]} saw {THINGS[(i // 4) % 4]}.\nThen {NAMES[(i + 1) % 4]} came and they "
        f"played with {THINGS[i % 3]} all day.\n<|endoftext|>\n"
        for i in range(count)
    ]
    return "".join(lines)


def small_config(name: str = "bitskip-v1", **changes: Any) -> ModelConfig:
    """A preset's features on 4 layers of 16."""
    shape = {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 24,
    }  # fmt: skip
    return small_twin(name).replace(**shape, **changes)


def small_train(**changes: Any) -> TrainConfig:
    """A few steps with exits and layer dropout on."""
    base = TrainConfig(
        context=8, batch=3, accumulation=2, steps=6, lr=1e-2, warmup=2, exit_lambda=0.3,
        exit_subset=2, dropout_max=0.9, dropout_form="v2", log_every=1, seed=5, threads=1,
    )  # fmt: skip
    return base.replace(**changes)


def small_split(vocabulary: int = 97, count: int = 400) -> Split:
    """Random tokens with a pattern that can be learned: half of them repeat."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, count).astype(np.uint16)
    tokens[1::2] = tokens[::2]
    return Split(tokens, 4 * count)


def small_trainer(
    out: Path, config: ModelConfig | None = None, valid: bool = False, **changes: Any
) -> Trainer:
    """A trainer of the above."""
    held_out = small_split() if valid else None
    return Trainer(
        config or small_config(), small_train(**changes), small_split(), held_out, "{}", out
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of stories."""
    path = tmp_path / "stories.txt"
    path.write_text(stories())
    return path
