"""`Engine.choose`: the token of `Sampler.choose`, whatever engine, sampler and logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_ref.config import small_twin
from bitskip_ref.decoding.sampling import Sampler
from tests.helpers import random_tensors
from tests.parity.engines import ENGINES, make

CONFIG = small_twin("wt2-bitskip")
VOCAB = CONFIG.vocab_size
TENSORS = random_tensors(CONFIG)
SAMPLERS = [
    Sampler(), Sampler(repetition_penalty=1.4), Sampler(0.7, seed=2),
    Sampler(1.0, top_k=9, repetition_penalty=0.6), Sampler(1.0, top_k=10**30, top_p=0.9),
    Sampler(1.3, min_p=0.04), Sampler(1e-6), Sampler(100.0, min_p=1.0),
    Sampler(1.0, top_k=VOCAB, top_p=0.9, min_p=0.03), Sampler(1.0, top_k=20, top_p=0.9, min_p=0.1),
    Sampler(1.0, logit_bias=((5, 9.0),)), Sampler(1.0, seed=2**64 - 1, top_p=0.5, min_p=0.01),
]  # fmt: skip


def told(choose: Any, *arguments: Any) -> int | str:
    """The token, or what is said of logits that choose none."""
    try:
        token = choose(*arguments)
    except ValueError as error:
        return str(error)
    assert type(token) is int
    return token


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_chooses_alike(name: str) -> None:
    engine, rng = make(name, CONFIG, TENSORS), np.random.default_rng(0)
    for case in range(60):
        size = VOCAB if case % 4 else int(rng.integers(1, VOCAB))  # a draft's, too (SPEC 11.1)
        z = (rng.standard_normal(size) * (0.3, 2, 20)[case % 3]).astype(np.float32)
        z = np.round(z) if case % 5 == 0 else z
        seen = set(rng.integers(0, VOCAB, case).tolist())
        for sampler in SAMPLERS:
            sampler, before = replace(sampler, seed=sampler.seed ^ case), z.tobytes()
            expected = told(sampler.choose, z, seen, case)
            assert told(engine.choose, z, sampler, seen, case) == expected
            assert z.tobytes() == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_choose_none_are_refused_alike() -> None:
    engine, smallest = Engine(CONFIG, TENSORS, 1), Sampler(1e-6, repetition_penalty=1e-6)
    for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30):
        for base in (0.0, value):
            z = np.full(VOCAB, base, np.float32)
            z[7] = value
            for sampler in (*SAMPLERS, smallest):
                expected = told(sampler.choose, z, {7}, 3)
                assert told(engine.choose, z, sampler, {7}, 3) == expected
    assert "token 3 are not finite" in str(told(engine.choose, z, smallest, {7}, 3))


def test_logits_of_other_kinds(tmp_path: Path) -> None:
    """Strides are taken; nothing else reaches a kernel."""
    engine, sampler = Engine(CONFIG, TENSORS, 1), Sampler(0.8)
    wide = np.random.default_rng(1).standard_normal(6 * VOCAB).astype(np.float32)
    for z in (wide[: 2 * VOCAB : 2], wide[:VOCAB][::-1]):
        assert engine.choose(z, sampler, (), 0) == sampler.choose(z.copy(), (), 0)
    for z in (wide[:0], wide, wide[:VOCAB].astype(np.float64), wide.reshape(6, VOCAB), None):
        with pytest.raises(ValueError, match="must be float32"):
            engine.choose(z, sampler, (), 0)  # type: ignore[arg-type]
    z, penalty = wide[:VOCAB], Sampler(repetition_penalty=2.0)
    wide.tofile(tmp_path / "logits")  # where a kernel that writes ends the process
    mapped = np.memmap(tmp_path / "logits", np.float32, "r", shape=VOCAB)
    assert engine.choose(mapped, penalty, {1, 2}, 0) == penalty.choose(z, {1, 2}, 0)
    with pytest.raises(ValueError, match="give a Sampler"):
        engine.choose(z, None, (), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more"):
        engine.choose(z, sampler, (), -1)
    with pytest.raises(ValueError, match="whole numbers"):
        engine.choose(z, penalty, ["a"], 0)  # type: ignore[list-item]
