"""Seeded choice (SPEC 9.2) against its definition, which sorts everything and adds fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from bitskip_ref.arithmetic.functions import exp
from bitskip_ref.decoding import sampling
from bitskip_ref.decoding.sampling import Sampler, uniform, weights

SAMPLERS = [
    Sampler(1.0),
    Sampler(0.3, seed=5),
    Sampler(0.8, top_k=7),
    Sampler(0.8, top_k=150),
    Sampler(1.0, top_p=0.9),
    Sampler(0.7, top_p=0.999),
    Sampler(1.0, min_p=0.05),
    Sampler(1.0, min_p=1e-7),
    Sampler(1.2, top_p=0.8, min_p=0.02),
    Sampler(1.2, top_k=20, top_p=0.8, min_p=1e-4),
    Sampler(1e-6, top_p=0.5),
    Sampler(1.0, top_k=40, top_p=0.95, min_p=0.05),  # top-p is a share of all that top-k leaves
    Sampler(1.0, top_k=300, top_p=0.9, min_p=0.01),
    Sampler(1.0, top_k=1000, top_p=0.9, min_p=0.01),
]


def defined(sampler: Sampler, z: np.ndarray, u: float) -> tuple[list[int], int]:
    """SPEC 9.2 word by word: what the filters leave, and the choice."""
    z = z / np.float32(sampler.temperature)
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    order = order[: sampler.top_k or None]
    e = exp(z[order] - z[order[0]])
    w = [Fraction(round(Fraction(float(x)) * 2**32), 2**32) for x in e]
    total, running, kept = sum(w), Fraction(0), []
    for i, x in zip(order, w, strict=True):
        running += x
        kept.append((i, x))
        if running >= Fraction(sampler.top_p * float(total)):
            break
    left = [(i, x) for i, x in kept if x >= Fraction(sampler.min_p)]
    goal = Fraction(u * float(sum(x for _, x in left)))
    running = Fraction(0)
    for i, x in left:
        running += x
        if running > goal:
            return [i for i, _ in left], i
    raise AssertionError("nothing was chosen")


def logits(case: int) -> np.ndarray:
    """Flat and peaked ones, with ties and with -inf."""
    rng = np.random.default_rng(case)
    z = (rng.standard_normal(300) * (0.1, 1, 4, 30, 1e6)[case % 5]).astype(np.float32)
    if case % 3 == 0:
        z = np.round(z)
    if case % 7 == 0:
        z[rng.random(300) < 0.3] = -np.inf
    return z


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
def test_choices_are_as_defined(sampler: Sampler) -> None:
    for case in range(70):
        z, u = logits(case), uniform(sampler.seed, case)
        left, chosen = defined(sampler, z, u)
        tempered = sampler.tempered(z, (), case)
        assert sampler.candidates(tempered)[0].tolist() == left
        assert sampler.choose(z, (), case) == chosen


def test_unlikely_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stand behind what is looked at first."""
    z = np.concatenate([[8.0], np.zeros(4000), [-6.0]]).astype(np.float32)
    for u in (0.0, 0.4, 0.7, 1 - 2.0**-53):
        monkeypatch.setattr(sampling, "uniform", lambda seed, index, u=u: u)
        assert Sampler(1.0).choose(z, (), 0) == defined(Sampler(1.0), z, u)[1]
        assert Sampler(1.0, top_p=0.9).choose(z, (), 0) == defined(Sampler(1.0, top_p=0.9), z, u)[1]


def test_sums_of_weights_do_not_depend_on_their_order() -> None:
    d = -np.random.default_rng(0).gamma(2, 5, 100_000).astype(np.float32)
    d[0] = 0
    w = weights(d)
    assert w.sum() == np.cumsum(np.sort(w))[-1] == np.cumsum(w[::-1])[-1] == sum(map(Fraction, w))
    e = exp(d).astype(np.float64)
    assert np.abs(w - e).max() <= 2.0**-33 and e.sum() != np.cumsum(np.sort(e))[-1]


def test_a_prefix_that_is_too_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake: looking only at the likeliest tokens changes choices."""
    whole = sampling.leading
    monkeypatch.setattr(sampling, "leading", lambda z, most: list(whole(z, most))[:1])
    with pytest.raises((AssertionError, IndexError)):
        test_choices_are_as_defined(Sampler(1.0))
