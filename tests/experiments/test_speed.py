"""The speed columns: that what is timed computes the same, and that the page is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_experiments import speed
from bitskip_experiments.definitions import load
from bitskip_experiments.llama import LlamaEngine
from bitskip_ref.config import small_twin
from bitskip_ref.decoding.choice import Choice
from bitskip_ref.exits.fixed import FixedExit
from tests.helpers import random_tensors, random_tokens


def test_transformers_llama_computes_the_same_at_every_exit() -> None:
    config = small_twin("llama3")
    tensors = random_tensors(config)
    ids = random_tokens(config, 6)
    ours, theirs = Engine(config, tensors, 1), LlamaEngine(config, tensors, 1)
    for n in (2, config.num_hidden_layers):
        mine, cache = ours.new_cache(), theirs.new_cache()
        for first in (0, 3):  # the second time from a cache that was cut back
            mine.length = cache.length = first
            for token in ids[first:]:
                wanted, _ = ours.step(token, mine, FixedExit(n))
                followed, found = theirs.step_on(token, cache, 3, Choice(), exit_layer=n)
                assert not followed and cache.length == mine.length
                assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_speeds_are_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "preset", small_twin)
    monkeypatch.setattr(speed, "EXITS", (1, 2, 3, 4))
    monkeypatch.setattr(speed, "TOKENS", 3)
    monkeypatch.setattr(speed, "FP32_TOKENS", 2)
    experiment = load("v1-table4", "cpu")
    said: list[str] = []
    speed.measure_speed(experiment, [], tmp_path, 1, 2, said.append)
    values = json.loads((tmp_path / "v1-table4/speed.json").read_text())
    assert sorted(values["table"]) == sorted(speed.PRESETS)
    assert sorted(values["table"]["BitSkip-V2"]) == ["1", "2", "3", "4"]
    assert all(len(row["tokens_per_s"]["samples"]) == 2 for row in values["rows"])
    page = (tmp_path / "v1-table4/speed.md").read_text()
    assert "| Llama3 FP32 | transformers (torch) | 1 | 2 | " in page
    assert "round 2 of 2" in said
