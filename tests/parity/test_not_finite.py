"""Logits that are not finite: the same refusal everywhere, and no kernel that loses its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_cpu.heldout.scoring import exit_losses
from bitskip_cpu.heldout.text import Text
from bitskip_ref.config import ModelConfig
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.model import ReferenceModel
from bitskip_train.loaded import TorchEngine
from tests.helpers import random_tensors, twin

HUGE = np.float32(3e38)
CONFIG = twin("per-layer-exits")
LAYERS = CONFIG.num_hidden_layers
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def engines(*overflowing: str) -> Iterator[Any]:
    """Reference and runtime on tensors of which some are far too large."""
    tensors = random_tensors(CONFIG)
    for name, values in tensors.items():
        if name in overflowing:
            values[:] = HUGE
    yield ReferenceModel(CONFIG, tensors)
    yield Engine(CONFIG, tensors, 1)


def last_exit() -> tuple[str, ...]:
    norm, head = CONFIG.exit_names(LAYERS)
    return f"{norm}.weight", f"{head}.scale"


def first_exit() -> tuple[str, ...]:
    norm, head = CONFIG.exit_names(1)
    return f"{norm}.weight", f"{head}.scale"


DRAFTS = Speculation(CONFIG, FixedExit(), 1, 3)
USES: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda e: list(stream(e, [1, 2], FixedExit(), Sampler(), 4)),
    "seeded": lambda e: list(stream(e, [1, 2], FixedExit(), Sampler(1.0, seed=1), 4)),
    "speculated": lambda e: list(speculate(e, [1, 2], DRAFTS, Sampler(), 4)),
    "speculated, seeded": lambda e: list(speculate(e, [1, 2], DRAFTS, Sampler(1.0), 4)),
    "loss": lambda e: exit_losses(e, Text(np.array([1, 2, 3]), 3, 1), [LAYERS]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_refused(use: Callable[[Any], Any]) -> None:
    """SPEC 9.5."""
    for engine in engines(*last_exit()):
        with pytest.raises(ValueError, match=r"logits of token \d are not finite"):
            use(engine)


def test_no_measure_is_above_a_threshold() -> None:
    """SPEC 8.5: a look at such logits never stops."""
    for engine in engines(*first_exit()):
        for measure in ("max", "margin", "entropy"):
            cache = engine.new_cache()
            rule = ConfidenceExit(-1.0, measure, layers=(1,))
            z, depth = engine.step(3, cache, rule)
            assert depth == LAYERS and np.isfinite(z).all()


def test_a_greedy_draft_is_unsure() -> None:
    """SPEC 11.1: the text is that of plain decoding; nothing is drafted."""
    for engine in engines(*first_exit()):
        for vocab in (None, 1):
            cache = engine.new_cache()
            drafts, z = engine.speculate(3, cache, 3, Draft(1, vocab))
            assert drafts == [] and len(z) == 1 and np.isfinite(z).all()
        plain = list(stream(engine, [1, 2], FixedExit(), Sampler(), 4))
        assert list(speculate(engine, [1, 2], DRAFTS, Sampler(), 4)) == plain


def all_engines(config: ModelConfig, tensors: dict[str, Any], kv_cache: str) -> tuple[Any, ...]:
    """Reference, runtime and PyTorch."""
    return (
        ReferenceModel(config, tensors, kv_cache),
        Engine(config, tensors, 1, kv_cache),
        TorchEngine(config, tensors, kv_cache),
    )


def finite(z: np.ndarray) -> list[bytes | None]:
    """Rows of logits; None for one that chooses nothing (SPEC 9.5)."""
    return [row.tobytes() if np.isfinite(row.max()) else None for row in z]


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("name", ["per-layer-exits", "wt2-h", "int8"])
def test_a_token_that_overflows_reaches_those_behind_it_alone(name: str, kv_cache: str) -> None:
    """SPEC 12.2: not those before it in a page, nor any once it is forgotten."""
    config, tensors = twin(name), random_tensors(twin(name))
    tensors["embed_tokens.scale"][7] = 3e36
    found = []
    for engine in all_engines(config, tensors, kv_cache):
        cache = engine.new_cache()
        rows = finite(engine.extend([3, 5, 7, 9], cache))
        assert [row is None for row in rows] == [False, False, True, True]
        cache.length = 1
        found.append([*rows, *finite(engine.step(4, cache, FixedExit())[0][None])])
    assert found[0] == found[1] == found[2] and found[0][-1] is not None


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "attn_norm", "down_proj"])
def test_any_part_of_a_block_may_overflow(part: str, kv_cache: str) -> None:
    """What chooses nothing in the definition does so everywhere."""
    for name in ("per-layer-exits", "int8"):
        config, tensors = twin(name), random_tensors(twin(name))
        for at, values in tensors.items():
            if at.startswith("layers.1.") and part in at and values.dtype == np.float32:
                values[:] = HUGE
        engines = all_engines(config, tensors, kv_cache)
        expected, *got = (finite(engine.logits([3, 5, 7, 9])) for engine in engines)
        assert [expected] * 2 == got
