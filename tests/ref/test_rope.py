"""RoPE scaling (SPEC 6.6) by literals and laws."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_ref.config import ConfigError, small_twin
from bitskip_ref.rope import rope_table, scaled, yarn

F = np.array([1.0, 0.5, 0.1, 0.01])  # turns in a context of 64: 10.2, 5.1, 1.02, 0.1


def test_linear_divides_all() -> None:
    assert np.array_equal(scaled(F, "linear", 4.0, 1.0, 4.0, 64), F / 4)
    config = small_twin("tiny").replace(rope_scaling="linear", rope_factor=2.0)
    plain, slow = rope_table(small_twin("tiny")), rope_table(config)
    for whole, half in zip(plain, slow, strict=True):  # every second position is an old one
        assert np.array_equal(whole[:32], half[::2])


def test_llama3_keeps_the_high_and_divides_the_low() -> None:
    found = scaled(F, "llama3", 8.0, 1.0, 4.0, 64)
    turns = 64 * 0.1 / 6.283185307179586
    share = (turns - 1) / 3
    assert found.tolist() == [1.0, 0.5, (1 - share) * (0.1 / 8) + share * 0.1, 0.01 / 8]
    assert np.array_equal(scaled(F, "llama3", 1.0, 1.0, 4.0, 64)[[0, 1, 3]], F[[0, 1, 3]])


def test_none_is_the_old_table() -> None:
    assert scaled(F, "none", 1.0, 1.0, 4.0, 64) is F


@pytest.mark.parametrize(("changes", "words"), [
    ({"rope_factor": 2.0}, "needs a rope_scaling"),
    ({"rope_scaling": "longrope"}, "rope_scaling"),
    ({"rope_attention_factor": 2.0}, "needs rope_scaling 'yarn'"),
    ({"rope_scaling": "yarn", "rope_beta_fast": 0.5}, "below rope_beta_fast"),
    ({"rope_scaling": "linear", "rope_factor": 0.5}, "from 1"),
    ({"rope_low_freq_factor": 4.0}, "must be above 0 and below"),
], ids=str)  # fmt: skip
def test_wrong_settings_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_twin("tiny").replace(**changes)


def test_yarn_by_hand() -> None:
    """Pairs that turn often stay, those that turn seldom are divided, between them a ramp."""
    f = 10_000.0 ** (-np.arange(16) / 16)
    found = yarn(f, 10_000.0, 4.0, 32.0, 1.0, 2048)
    # Pair i turns 2048 f / 2 pi times: 32 between i = 4 and 5, 1 between 10 and 11.
    share = np.clip((np.arange(16) - 4) / 7, 0, 1)
    np.testing.assert_allclose(found, f * (1 - share) + f / 4 * share, rtol=1e-14)
    config = small_twin("bitskip-v1")
    plain = rope_table(config)
    longer = config.replace(rope_scaling="yarn", rope_attention_factor=2.0)  # a factor of 1
    for once, twice in zip(plain, rope_table(longer), strict=True):
        np.testing.assert_allclose(twice, 2 * once, rtol=2e-7)
