"""float16, bfloat16: every number exactly to float32, and roundings back (SPEC 6.5, 4.5)."""

from __future__ import annotations

import numpy as np
import pytest
from llvmlite import ir

from bitskip_cpu import isa
from bitskip_cpu.kernels.arithmetic import float16 as kernels
from bitskip_cpu.kernels.arithmetic.lanes import store_lanes
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_ref.arithmetic.functions import half
from bitskip_ref.floats import widened
from tests.kernels.calling import call, same_bits

f32 = np.float32
FINITE = np.arange(1 << 16, dtype=np.uint16)
FINITE = FINITE[np.isfinite(FINITE.view(np.float16))]


def test_widen_every_finite_half() -> None:
    out = np.zeros(len(FINITE), f32)
    call(kernels.widen, FINITE, out, len(FINITE))
    assert same_bits(FINITE.view(np.float16).astype(f32), out)


@pytest.mark.skipif(isa.INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("hardware", [True, False])
def test_lanes_of_every_finite_half(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU's instruction, if it has one, and by the way for CPUs without."""
    if hardware and not isa.converts_float16():
        pytest.skip("this CPU has no such instruction")
    monkeypatch.setattr(isa, "converts_float16", lambda: hardware)

    @intrinsic()
    def widen(builder: ir.IRBuilder, source: ir.Value, target: ir.Value) -> None:
        store_lanes(builder, kernels.load_float16s(builder, source), target)

    def widen_all(source: int, target: int, n: int) -> None:
        for i in range(0, n, LANES):
            widen(source + 2 * i, target + 4 * i)

    assert len(FINITE) % LANES == 0
    out = np.zeros(len(FINITE), f32)
    call(kernel(widen_all), FINITE, out, len(FINITE))
    assert same_bits(FINITE.view(np.float16).astype(f32), out)
    call(kernel(widen_all), np.full(LANES, np.nan, np.float16), out, LANES)
    assert np.isnan(out[:LANES]).all() and not np.isnan(out[LANES:]).any()


def test_every_finite_bfloat16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(widened(bits))]
    out = np.zeros(len(bits), f32)
    call(kernels.widen_bfloat16, bits, out, len(bits))
    assert same_bits(widened(bits), out)


def test_every_kind_of_rounding() -> None:
    exact = np.sort(FINITE.view(np.float16).astype(f32))
    ties = (exact[1:] + exact[:-1]) / 2  # exact in float32
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(1 << 16) * 2.0 ** rng.integers(-40, 40, 1 << 16)
    large = np.array([65504, 65519.996, 65520, 65536, 1e30, 3e38, np.inf], f32)
    tiny = np.array([0.0, 1e-45, 1e-40, 2.0**-25, 2.0**-24], f32)
    near = [np.nextafter(x, f32(s), dtype=f32) for x in (exact, ties) for s in (-np.inf, np.inf)]
    x = np.concatenate([exact, ties, *near, wide.astype(f32), large, -large, tiny, -tiny])
    out = np.zeros(len(x), np.uint16)
    call(kernels.narrow, x, out, len(x))
    assert same_bits(half(x), out.view(np.float16))
    call(kernels.narrow, np.full(9, np.nan, f32), out, 9)
    assert np.isnan(out[:9].view(np.float16)).all()  # as in the definition (SPEC 9.5)
