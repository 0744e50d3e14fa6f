"""Which logits a token is chosen from (SPEC 9.6): leaving out the others changes no token."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.sampling import Sampler

SAMPLERS = [
    Sampler(),
    Sampler(0.7, top_k=1),
    Sampler(0.7, top_k=5),
    Sampler(1.3, top_k=40, top_p=0.9, min_p=0.02),
    Sampler(0.8, min_p=0.05),
    Sampler(2.0, min_p=2.0**-20),
    Sampler(1e-6, top_k=3),
]


def without(z: np.ndarray, contenders: Contenders) -> np.ndarray:
    """Logits with -inf in place of all that SPEC 9.6 lets an engine leave out."""
    divided = z / np.float32(contenders.temperature)
    least = np.sort(divided)[-min(contenders.count, len(z))]
    return np.where(divided < least - np.float32(contenders.reach), -np.float32(np.inf), z)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
def test_what_is_left_out_changes_no_token(sampler: Sampler) -> None:
    rng, left_out = np.random.default_rng(0), 0
    for case in range(300):
        z = (rng.standard_normal(200) * (0.01, 1, 30)[case % 3]).astype(np.float32)
        if case % 4 == 0:  # ties, some of which only the division makes
            z = np.nextafter(np.round(z), np.float32([-np.inf, np.inf] * 100)).astype(np.float32)
        assert sampler.contenders is not None
        fewer = without(z, sampler.contenders)
        left_out += np.isneginf(fewer).sum()
        changed = Sampler(**{**vars(sampler), "seed": case})
        assert changed.choose(fewer, (), case) == changed.choose(z, (), case)
    assert left_out


def test_who_needs_all_logits() -> None:
    for sampler in (
        Sampler(1.0), Sampler(1.0, top_p=0.9), Sampler(1.0, top_p=0.9, min_p=0.1),
        Sampler(repetition_penalty=1.1), Sampler(logit_bias=((1, 2.0),)), Sampler(1.0, top_k=999),
        Sampler(1.0, min_p=1e-9),
    ):  # fmt: skip
        assert sampler.contenders is None


@pytest.mark.parametrize(
    "wrong",
    [Contenders(0), Contenders(257), Contenders(1, 0.0), Contenders(1, 1.0, -1.0),
     Contenders(1, 1.0, float("inf")), Contenders(1, float("nan")), Contenders(1, 1e39),
     Contenders(1, 10**400), Contenders(1, 1e-46), Contenders(1, 1.0, 1e39)],  # no float32
)  # fmt: skip
def test_wrong_ones_are_refused(wrong: Contenders) -> None:
    with pytest.raises(ValueError, match="contenders"):
        wrong.check()
