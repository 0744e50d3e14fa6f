"""How floats are stored (SPEC 4.5): literals of bfloat16, its roundings, and what is no number."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_ref.floats import BFLOAT16, LARGEST, all_finite, stored, widened

f32 = np.float32
EVERY = np.arange(1 << 16, dtype=np.uint16)


def test_what_the_bits_stand_for() -> None:
    bits = np.array([0x3F80, 0xBF80, 0x4049, 0x0001, 0x8000, 0x7F7F], BFLOAT16)
    expected = np.array([1, -1, 3.140625, 2.0**-133, -0.0, 255 * 2.0**120], f32)
    assert np.array_equal(widened(bits).view(np.uint32), expected.view(np.uint32))


def test_every_bfloat16_is_kept() -> None:
    finite = EVERY[np.isfinite(widened(EVERY))]
    assert len(finite) == (1 << 16) - 2 * 128
    assert np.array_equal(stored(widened(finite), BFLOAT16), finite)


@pytest.mark.parametrize(("x", "bits"), [
    (1 + 2.0**-8, 0x3F80),  # half way: to the even one, below
    (1 + 3 * 2.0**-8, 0x3F82),  # half way: to the even one, above
    (1 + 2.0**-8 + 2.0**-23, 0x3F81), (1 + 2.0**-8 - 2.0**-23, 0x3F80),
    (-1 - 3 * 2.0**-8, 0xBF82), (2 - 2.0**-23, 0x4000), (2.0**-149, 0x0000),
    (2.0**-134, 0x0000), (3 * 2.0**-134, 0x0002),  # subnormals
], ids=str)  # fmt: skip
def test_rounding_to_nearest_even(x: float, bits: int) -> None:
    assert stored(np.array([x], f32), BFLOAT16)[0] == bits


@pytest.mark.parametrize("kind", [np.float16, BFLOAT16])
def test_what_is_too_large_is_refused(kind: type) -> None:
    name, largest = LARGEST[kind]
    assert widened(stored(np.array([-largest], f32), kind))[0] == -largest
    above = np.nextafter(f32(largest), f32(np.inf))
    with pytest.raises(ValueError, match=rf"exceeds {name} \("):
        stored(np.array([0, -above], f32), kind)


def test_what_is_no_number_is_seen() -> None:
    finite = np.isfinite(widened(EVERY))
    assert [all_finite(EVERY[i : i + 1]) for i in range(1 << 16)] == finite.tolist()
    assert all_finite(EVERY[finite]) and not all_finite(EVERY)
    assert all_finite(np.ones((3, 4), f32)) and not all_finite(np.array([[1, np.inf]], f32))
