"""Tokens that an engine chooses itself, one after the other within one call (SPEC 9)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitskip_ref.checks import is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.excerpt import shown

GREEDY = Sampler()
MOST = 32  # tokens after the first that a call may run


@dataclass(frozen=True)
class Choice:
    """What an engine needs to know to choose tokens itself, and where to stop."""

    sampler: Sampler = GREEDY  # without a logit bias
    ends: Collection[int] = ()
    """Ids that end a text (SPEC 9.4): none of them is run."""
    seen: Collection[int] = ()
    """Ids that the penalty counts (SPEC 9.2), the first token's among them; those that are chosen
    are counted as they come."""
    made: int = 0
    """Tokens that were generated before the one that is chosen first (SPEC 9.3)."""


class Chosen(NamedTuple):
    """A Choice, checked."""

    sampler: Sampler
    ends: np.ndarray  # int64
    seen: np.ndarray  # int64, each once
    made: int

    def next(self, z: np.ndarray, behind: Sequence[int]) -> int | None:
        """The token after logits f32 [V], `behind` being those since; None where the caller has to
        look: it ends the text, or there is none (SPEC 9.5)."""
        seen = {*self.seen.tolist(), *behind} if self.sampler.repetition_penalty != 1 else ()
        try:
            token = self.sampler.choose(z, seen, self.made + len(behind))
        except ValueError:
            return None
        return None if token in self.ends else token


def check_choice(
    asked: Choice, count: int, config: ModelConfig, contenders: Contenders | None = None
) -> Chosen:
    """Raises ValueError for what is no Choice, a value out of range, a wrong count, or contenders
    of another choice (SPEC 9.6)."""
    if not isinstance(asked, Choice):
        raise ValueError(f"{shown(asked)} is not how tokens are chosen: give a Choice")
    chosen = _checked(asked, config)
    if asked.sampler.logit_bias:
        raise ValueError("a logit bias: tokens that an engine goes on with by itself take none")
    if contenders not in (None, asked.sampler.contenders):
        raise ValueError(
            f"{contenders} are not the sampler's: give its own, or None for all logits"
        )
    if not is_whole(count) or not 0 <= count <= MOST:
        raise ValueError(f"{shown(count)} tokens after the first: a call takes 0..{MOST}")
    return chosen


def check_choosing(
    logits: np.ndarray, sampler: Sampler, seen: Collection[int], index: int, config: ModelConfig
) -> Chosen:
    """For one token from given logits. Raises ValueError for what are none, or out of range."""
    if (
        not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 1
        or not 1 <= len(logits) <= config.vocab_size
    ):  # fmt: skip
        raise ValueError(f"logits {shown(logits)}: must be float32 [1..{config.vocab_size}]")
    return _checked(Choice(sampler, (), seen, index), config)


def _checked(asked: Choice, config: ModelConfig) -> Chosen:
    sampler, made = asked.sampler, asked.made
    if not isinstance(sampler, Sampler):
        raise ValueError(f"{shown(sampler)} is not how tokens are chosen: give a Sampler")
    if not is_whole(made) or made < 0:
        raise ValueError(f"{shown(made)} tokens before: must be a whole number, 0 or more")
    seen = _ids(asked.seen, config) if sampler.repetition_penalty != 1 else np.zeros(0, np.int64)
    return Chosen(sampler, _ids(asked.ends, config), seen, int(made))


def _ids(ids: Collection[int], config: ModelConfig) -> np.ndarray:
    """int64, each once; those that no token of this model has are nowhere chosen or seen."""
    try:
        if not len(ids):  # as of most tokens that are chosen one by one
            return np.zeros(0, np.int64)
        found = np.array(list(ids))
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"token ids {shown(ids)}: must be a collection of whole numbers")
    found = np.sort(found[(found >= 0) & (found < config.vocab_size)].astype(np.int64))
    return np.asarray(found[np.diff(found, prepend=-1) > 0])  # np.unique imports much at first
