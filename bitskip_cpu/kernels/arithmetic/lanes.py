"""Operations on LANES floats at once, where LLVM would not find the vector by itself.

The vectors are LLVM's generic ones, which every target can run; each lane is rounded as SPEC 2.1
says. Arguments named `*_at` are addresses. Interpreted, the same operations are NumPy's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from bitskip_cpu.kernels.layout import LANES, key_slots
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic
from bitskip_cpu.kernels.numba_inside.emit import INT, LONG, loop, pointer, variable
from bitskip_cpu.kernels.numba_inside.views import floats, int32s

Add = Callable[[Any, Any], Any]
LANE_FLOATS = ir.VectorType(ir.FloatType(), LANES)
LANE_INTS = ir.VectorType(INT, LANES)
LANE_BYTES = 4 * LANES


def paired(x: Sequence[Any], add: Add = operator.add) -> Any:
    """Sum of neighbours (SPEC 2.3), one branch after the other."""
    half = len(x) // 2
    return x[0] if not half else add(paired(x[:half], add), paired(x[half:], add))


def load_lanes(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Load the LANES floats there."""
    return builder.load(pointer(builder, address, LANE_FLOATS), align=4)


def store_lanes(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Store LANES floats there."""
    builder.store(value, pointer(builder, address, LANE_FLOATS), align=4)


def load_splat(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Load the float there into every lane."""
    at = pointer(builder, address, ir.FloatType())
    return splat(builder, builder.load(at, align=4))


def splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Put the number into every lane."""
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, INT(0))
    mask = ir.Constant(LANE_INTS, [0] * LANES)
    return builder.shuffle_vector(first, nothing, mask)


def swapped(builder: ir.IRBuilder, x: ir.Value, h: int) -> ir.Value:
    """Lane i ^ h in lane i."""
    return builder.shuffle_vector(x, x, ir.Constant(LANE_INTS, [i ^ h for i in range(LANES)]))


def _add(a_at: int, b_at: int, out_at: int) -> None:
    floats(out_at, LANES)[:] = floats(a_at, LANES) + floats(b_at, LANES)


def _scale(a_at: int, x: Any, out_at: int) -> None:
    floats(out_at, LANES)[:] = floats(a_at, LANES) * x


def _larger(a_at: int, b_at: int, out_at: int) -> None:
    a, b = floats(a_at, LANES), floats(b_at, LANES)
    floats(out_at, LANES)[:] = np.where(a > b, a, b)


def _largest(at: int) -> Any:
    return floats(at, LANES).max()


def _halved(at: int) -> Any:
    x, n = floats(at, LANES), LANES
    while n > 1:
        n //= 2
        x = x[:n] + x[n:]
    return x[0]


def _reverse_64(x_at: int, out_at: int) -> None:
    floats(out_at, 64)[key_slots(64)] = floats(x_at, 64)


def _scaled_sums(acc_at: int, total: Any, x: Any, out_at: int) -> None:
    exact = int32s(acc_at, LANES) - np.int32(total)
    floats(out_at, LANES)[:] = exact.astype(np.float32) * x


@intrinsic(_add)
def add(builder, a_at, b_at, out_at):
    """out = a + b."""
    a, b = (load_lanes(builder, at) for at in (a_at, b_at))
    store_lanes(builder, builder.fadd(a, b), out_at)


@intrinsic(_scale, x="float32")
def scale(builder, a_at, x, out_at):
    """out = a * x."""
    scaled = builder.fmul(load_lanes(builder, a_at), splat(builder, x))
    store_lanes(builder, scaled, out_at)


@intrinsic(_larger)
def larger(builder, a_at, b_at, out_at):
    """out = the larger of a and b."""
    a, b = (load_lanes(builder, at) for at in (a_at, b_at))
    chosen = builder.select(builder.fcmp_ordered(">", a, b), a, b)
    store_lanes(builder, chosen, out_at)


@intrinsic(_largest, returns="float32")
def largest(builder, at):
    """The largest of LANES floats."""
    x = load_lanes(builder, at)
    h = LANES // 2
    while h:
        y = swapped(builder, x, h)
        x = builder.select(builder.fcmp_ordered(">", x, y), x, y)
        h //= 2
    return builder.extract_element(x, INT(0))


@intrinsic(_halved, returns="float32")
def halved(builder, at):
    """The sum of LANES floats by halving (SPEC 2.2)."""
    x = load_lanes(builder, at)
    h = LANES // 2
    while h:
        x = builder.fadd(x, swapped(builder, x, h))
        h //= 2
    return builder.extract_element(x, INT(0))


@intrinsic(_reverse_64)
def reverse_64(builder, x_at, out_at):
    """Put 64 floats into the order of `key_slots`."""
    kind, index = ir.VectorType(ir.FloatType(), 64), ir.VectorType(INT, 64)
    x = builder.load(pointer(builder, x_at, kind), align=4)
    order = ir.Constant(index, key_slots(64).tolist())  # its own inverse
    builder.store(builder.shuffle_vector(x, x, order), pointer(builder, out_at, kind), align=4)


@intrinsic(_scaled_sums, total="int32", x="float32")
def scaled_sums(builder, acc_at, total, x, out_at):
    """out = f32(acc - total) * x."""
    kind = ir.VectorType(INT, LANES)
    acc = builder.load(pointer(builder, acc_at, kind), align=4)
    exact = builder.sub(acc, splat(builder, total))
    scaled = builder.fmul(builder.sitofp(exact, LANE_FLOATS), splat(builder, x))
    store_lanes(builder, scaled, out_at)


def _butterfly(count: int) -> Callable[..., None]:
    """(x, out): SPEC 5.2 without its scale, of `count` vectors side by side."""

    def twin(at: int, out_at: int) -> None:
        n = count * LANES
        x, h = floats(at, n).copy(), n // 2
        while h:
            a, b = x.reshape(-1, 2, h).transpose(1, 0, 2)
            x = np.stack([a + b, a - b], axis=1).reshape(-1)
            h //= 2
        floats(out_at, n)[:] = x

    @intrinsic(twin)
    def butterfly(builder, at, out_at):
        x = [load_lanes(builder, builder.add(at, LONG(i * LANE_BYTES))) for i in range(count)]
        h = count // 2
        while h:
            met = [(x[i ^ h], x[i]) if i & h else (x[i], x[i ^ h]) for i in range(count)]
            x = [builder.fsub(*p) if i & h else builder.fadd(*p) for i, p in enumerate(met)]
            h //= 2
        h = LANES // 2
        while h:
            # Lane i meets lane i ^ h; the upper one of a pair becomes other - itself.
            signs = ir.Constant(LANE_FLOATS, [-1.0 if i & h else 1.0 for i in range(LANES)])
            x = [builder.fadd(swapped(builder, v, h), builder.fmul(v, signs)) for v in x]
            h //= 2
        for i, v in enumerate(x):
            store_lanes(builder, v, builder.add(out_at, LONG(i * LANE_BYTES)))

    return butterfly


VECTORS = 4  # whose butterflies take turns
RUN = VECTORS * LANES
butterfly_lanes, butterfly_run = _butterfly(1), _butterfly(VECTORS)


def _two_steps(at: int, distance: int) -> None:
    a, b, c, d = (floats(at + i * distance, LANES) for i in range(4))
    e, f, g, h = a + c, b + d, a - c, b - d
    a[:], b[:], c[:], d[:] = e + f, e - f, g + h, g - h


@intrinsic(_two_steps)
def two_steps(builder, at, distance):
    """Two steps of SPEC 5.2 on four vectors that lie so many bytes apart, in place."""
    places = [builder.add(at, builder.mul(distance, LONG(i))) for i in range(4)]
    a, b, c, d = (load_lanes(builder, place) for place in places)
    e, f = builder.fadd(a, c), builder.fadd(b, d)
    g, h = builder.fsub(a, c), builder.fsub(b, d)
    results = builder.fadd(e, f), builder.fsub(e, f), builder.fadd(g, h), builder.fsub(g, h)
    for place, result in zip(places, results, strict=True):
        store_lanes(builder, result, place)


def _weighted_run(weights: int, count: int, x: int, stride: int, factor: Any, out: int) -> None:
    total = floats(weights, count)[0] * floats(x, RUN)
    for j in range(1, count):
        total = total + floats(weights, count)[j] * floats(x + j * stride, RUN)
    floats(out, RUN)[:] = total * factor


@intrinsic(_weighted_run, factor="float32")
def weighted_run(builder, weights_at, count, x_at, stride, factor, out_at):
    """out = factor * (weights[0] * x[0] + ...), one after the other; x[j], RUN floats, lies j times
    `stride` bytes behind x."""

    def products(j):
        weight = load_splat(builder, builder.add(weights_at, builder.shl(j, LONG(2))))
        at = builder.add(x_at, builder.mul(j, stride))
        places = (builder.add(at, LONG(i * LANE_BYTES)) for i in range(VECTORS))
        return [builder.fmul(weight, load_lanes(builder, place)) for place in places]

    totals = [variable(builder, product) for product in products(LONG(0))]
    with loop(builder, builder.sub(count, LONG(1))) as index:
        for total, product in zip(totals, products(builder.add(index, LONG(1))), strict=True):
            builder.store(builder.fadd(builder.load(total), product), total)
    for i, total in enumerate(totals):
        scaled = builder.fmul(builder.load(total), splat(builder, factor))
        store_lanes(builder, scaled, builder.add(out_at, LONG(i * LANE_BYTES)))
