"""Choosing a token from logits (SPEC section 9)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitskip_ref.arithmetic.functions import exp
from bitskip_ref.checks import check_logits, is_number, is_whole
from bitskip_ref.decoding.contenders import LARGEST, LEAST, MOST_CONTENDERS, Contenders

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
LEAST_MIN_P = 2.0**-20  # so rounded weights and a reach of 9.6 agree on what is below
UNIT = 2.0**-32  # of weights (SPEC 9.2)


def splitmix64(state: int) -> int:
    """The output function of SplitMix64 (Steele et al. 2014) on a 64-bit state."""
    z = state & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, index: int) -> float:
    """SPEC 9.3: the draw in [0, 1) for the generated token of that index (from 0)."""
    return (splitmix64(seed + (index + 1) * _GOLDEN) >> 11) * 2.0**-53


def pick(ids: np.ndarray, weights: np.ndarray, u: float) -> int:
    """SPEC 9.2: the first id whose running sum of weights (binary64) exceeds u of their total."""
    running = np.cumsum(weights)
    at = np.searchsorted(running, u * running[-1], side="right")
    return int(ids[min(int(at), len(ids) - 1)])


def weights(d: np.ndarray) -> np.ndarray:
    """SPEC 9.2: what logits f32, less the largest, weigh: binary64, sums exact in any order."""
    return np.rint(exp(d) * np.float32(1 / UNIT)).astype(np.float64) * UNIT


def leading(z: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, float]]:
    """Longer and longer beginnings of the first `most` ids in SPEC 9.2's order, the last one whole.

    Each with a bound that the weights behind it are less than: whoever needs no more stops there,
    so that a whole vocabulary is hardly ever sorted for a token.
    """

    def ordered(ids: np.ndarray) -> Any:
        return ids[np.argsort(-z[ids], kind="stable")][:most]

    d = z - z.max()
    for within in (5.0, 12.0):
        ids = np.flatnonzero(d >= np.float32(-within))
        if len(ids) >= most or most == len(z):
            yield ordered(ids), 1.001 * math.exp(-within)
    if most < len(z):
        yield ordered(np.flatnonzero(z >= np.partition(z, -most)[-most])), 0.0
    else:
        yield ordered(np.arange(len(z))), 0.0


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen. Temperature 0 is greedy; the defaults filter nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit)."""

    def __post_init__(self) -> None:
        t, r = self.temperature, self.repetition_penalty
        for name, value, whole, good, rule in (
            ("temperature", t, False, lambda x: x == 0 or LEAST <= x <= LARGEST,
             "0, or between 1e-06 and 100"),
            ("top-k", self.top_k, True, lambda x: x >= 0, "0 (all) or more"),
            ("top-p", self.top_p, False, lambda x: 0 < x <= 1, "above 0, at most 1"),
            ("min-p", self.min_p, False, lambda x: 0 <= x <= 1, "between 0 and 1"),
            ("repetition penalty", r, False, lambda x: LEAST <= x <= LARGEST,
             "between 1e-06 and 100"),
            ("seed", self.seed, True, lambda x: 0 <= x <= _MASK, "between 0 and 2^64 - 1"),
        ):  # fmt: skip
            if not (is_whole(value) if whole else is_number(value)) or not good(value):
                kind = "a whole number, " if whole else ""
                raise ValueError(f"{name} {value!r}: must be {kind}{rule}")
        for pair in self.logit_bias:
            if not (
                isinstance(pair, tuple) and len(pair) == 2 and is_whole(pair[0])
                and pair[0] >= 0 and is_number(pair[1]) and abs(pair[1]) <= 100
            ):  # fmt: skip
                raise ValueError(
                    f"logit bias {pair!r}: must be a token id and a number between -100 and 100"
                )
        object.__setattr__(self, "seed", int(self.seed))  # its arithmetic has more than 64 bits

    @property
    def contenders(self) -> Contenders | None:
        """The logits that `choose` needs (SPEC 9.6); None: all of them."""
        if self.repetition_penalty != 1 or self.logit_bias:
            return None
        if self.temperature == 0:
            return Contenders()
        if 0 < self.top_k <= MOST_CONTENDERS:
            return Contenders(self.top_k, self.temperature)
        if self.top_k == 0 and self.top_p == 1 and self.reach < math.inf:
            return Contenders(1, self.temperature, self.reach)
        return None

    @property
    def reach(self) -> float:
        """How far below the largest, over the temperature, min-p leaves a logit at most (9.6)."""
        return 1e-3 - math.log(self.min_p) if self.min_p >= LEAST_MIN_P else math.inf

    def choose(self, logits: np.ndarray, seen: Collection[int], index: int) -> int:
        """The token id for logits f32 [V] (SPEC 9.1, 9.2).

        `seen`: ids of prompt and text so far; `index`: how many tokens were generated before.
        Raises ValueError for logits that choose none (SPEC 9.5).
        """
        if self.temperature == 0:
            z = self.penalised(logits, seen)
            best = int(np.argmax(z))  # a NaN, if there is one
            if not math.isfinite(z[best]):
                check_logits(z[best : best + 1], index)
            return best
        z, u = self.tempered(logits, seen, index), uniform(self.seed, index)
        if self.top_k == 0 and self.top_p == 1 and self.min_p == 0:
            return self._draw(z, u)
        return pick(*self.candidates(z), u)

    def _draw(self, z: np.ndarray, u: float) -> int:
        """The token for a draw u where no filter leaves anything out."""
        goal = u * weights(z - z.max()).sum()
        for ids, _ in leading(z, len(z)):
            running = np.cumsum(weights(z[ids] - z[ids[0]]))
            if running[-1] > goal:
                break
        return int(ids[np.searchsorted(running, goal, side="right")])

    def penalised(self, logits: np.ndarray, seen: Collection[int]) -> np.ndarray:
        """Logits after bias and repetition penalty, f32 [V]; the input is not changed."""
        if self.logit_bias:
            logits = logits.copy()
            for i, bias in self.logit_bias:
                if i < len(logits):
                    logits[i] += np.float32(bias)
        if self.repetition_penalty == 1.0 or not seen:
            return logits
        r = np.float32(self.repetition_penalty)
        z, ids = logits.copy(), np.fromiter(seen, np.int64)  # an id twice is the same once
        ids = ids[ids < len(z)]  # a draft has the logits of the first ids only (SPEC 11.1)
        z[ids] = np.where(z[ids] > 0, z[ids] / r, z[ids] * r)
        return z

    def tempered(self, logits: np.ndarray, seen: Collection[int], index: int) -> np.ndarray:
        """`penalised` logits over the temperature, f32 [V]. Raises ValueError as `choose`."""
        z = self.penalised(logits, seen) / np.float32(self.temperature)
        check_logits(z.max(keepdims=True), index)
        return z

    def candidates(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What top-k, top-p and min-p leave of `tempered`: (ids, weights binary64), best first."""
        top_k = self.top_k if self.top_k < len(z) else 0
        most = top_k or len(z)
        # What top-k leaves is its own total; where top-p leaves all, none is needed.
        total = None if top_k or self.top_p == 1 else weights(z - z.max()).sum()
        for ids, behind in leading(z, most):
            w = weights(z[ids] - z[ids[0]])
            running = np.cumsum(w)
            goal = self.top_p * (running[-1] if total is None else total)
            if behind < self.min_p or len(ids) == most or (total and running[-1] >= goal):
                break
        kept = int(np.searchsorted(running, goal, side="left")) + 1
        ids, w = ids[:kept], w[:kept]
        likely = w >= self.min_p
        return ids[likely], w[likely]
