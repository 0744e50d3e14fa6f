"""Logits that are not finite: the same refusal everywhere, and no kernel that loses its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_cpu.heldout.scoring import exit_losses
from bitskip_cpu.heldout.text import Text
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.model import ReferenceModel
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
