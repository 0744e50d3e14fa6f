"""Greedy tokens that follow each other within one call of an engine (SPEC 9.1)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitskip_ref.checks import is_number, is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.sampling import LEAST, Sampler
from bitskip_ref.excerpt import shown

MOST = 32  # tokens after the first that a call may run


@dataclass(frozen=True)
class Greedy:
    """What an engine needs to know to choose greedy tokens itself, and where to stop."""

    ends: Collection[int] = ()
    """Ids that end a text (SPEC 9.4): none of them is run."""
    repetition_penalty: float = 1.0
    seen: Collection[int] = ()
    """Ids that the penalty counts (SPEC 9.2), the first token's among them; those that are chosen
    are counted as they come."""


class Chosen(NamedTuple):
    """A Greedy, checked."""

    ends: np.ndarray  # int64
    penalty: float
    seen: np.ndarray  # int64, each once

    def next(self, z: np.ndarray, behind: Sequence[int]) -> int | None:
        """The token after logits f32 [V], `behind` being those since; None where the caller has to
        look: it ends the text, or there is none (SPEC 9.5)."""
        if self.penalty != 1:
            seen = {*self.seen.tolist(), *behind}
            z = Sampler(repetition_penalty=self.penalty).penalised(z, seen)
        best = int(np.argmax(z))
        return best if math.isfinite(z[best]) and best not in self.ends else None


def check_greedy(asked: Greedy, count: int, config: ModelConfig) -> Chosen:
    """Raises ValueError for what is no Greedy, a value out of range, or a wrong count."""
    if not isinstance(asked, Greedy):
        raise ValueError(f"{asked!r} is not how greedy tokens are chosen: give a Greedy")
    if not is_whole(count) or not 0 <= count <= MOST:
        raise ValueError(f"{shown(count)} tokens after the first: a call takes 0..{MOST}")
    r = asked.repetition_penalty
    if not is_number(r) or not LEAST <= r <= 100:
        raise ValueError(f"repetition penalty {shown(r)}: must be between {LEAST:g} and 100")
    seen = _ids(asked.seen, config) if r != 1 else np.zeros(0, np.int64)
    return Chosen(_ids(asked.ends, config), float(r), seen)


def _ids(ids: Collection[int], config: ModelConfig) -> np.ndarray:
    """int64, each once; those that no token of this model has are nowhere chosen or seen."""
    try:
        found = np.unique(np.fromiter(ids, np.int64, len(ids)))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"token ids {shown(ids)}: must be a collection of whole numbers") from None
    return found[(found >= 0) & (found < config.vocab_size)]
