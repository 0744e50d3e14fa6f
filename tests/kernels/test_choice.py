"""Drawing a token by the kernel: as the reference chooses, for every filter and shape of logits."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.kernels import choice
from bitskip_ref.decoding import sampling
from bitskip_ref.decoding.sampling import Sampler
from tests.kernels.calling import at, compiled
from tests.ref.test_sampling import SAMPLERS, logits


def drawn(sampler: Sampler, z: np.ndarray, index: int) -> int:
    """The kernel's choice; what it is given is not changed, and its room not left."""
    room = np.full(16 * len(z) + 68, 0xA5, np.uint8)
    before = z.copy()
    token = compiled(choice.draw)(
        at(z), len(z), z.max(), np.float32(sampler.temperature), sampler.top_k,
        float(sampler.top_p), float(sampler.min_p), np.float32(-sampler.reach),
        sampling.uniform(sampler.seed, index), at(room),
    )  # fmt: skip
    assert z.tobytes() == before.tobytes() and (room[-64:] == 0xA5).all()
    return int(token)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
def test_tokens_are_the_references(sampler: Sampler) -> None:
    for case in range(350):
        z = logits(case)
        assert drawn(sampler, z, case) == sampler.choose(z, (), case)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
def test_large_and_tiny_vocabularies(sampler: Sampler) -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 15, 17, 5000, 40_003):
        for case in range(6):
            z = (rng.standard_normal(n) * (0.2, 2, 5)[case % 3]).astype(np.float32)
            assert drawn(sampler, z, case) == sampler.choose(z, (), case)


def test_weights_that_are_rounded_up_to_a_tiny_min_p(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-22.5) lies below this min-p, the weight that it is rounded to does not (SPEC 9.2)."""
    z = np.full(4000, -22.5, np.float32)
    z[7] = 0
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: 1 - 2.0**-40)
    sampler = Sampler(1.0, min_p=2e-10)
    assert sampler.choose(z, (), 0) == drawn(sampler, z, 0) == 3999
