"""Exact integer products of 8-bit codes as LLVM IR (SPEC 4.3, 4.4).

Every kernel multiplies unsigned bytes by signed bytes and adds groups of four products to 32-bit
lanes; paths differ in the width of a register and in `dot`, the instruction for that (`DOTS`).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.numba_inside.emit import BYTE, INT, LONG, WORD, call, pointer, prefetch
from bitskip_cpu.kernels.products.ternary_layout import BY_WORDS, LINE

SPARSE = 8 * LINE  # bytes of which one line is asked for, where not all are
WIDTH = PATH.width
BYTES = ir.VectorType(BYTE, WIDTH)
WORDS = ir.VectorType(WORD, WIDTH // 2)
INTS = ir.VectorType(INT, WIDTH // 4)

Dot = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
"""(builder, total, u, s) -> total, int32 lanes, + the sums of four u8 * s8 products each."""
Kernel = Callable[..., None]


def constant(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector of equal constants."""
    return ir.Constant(kind, [value] * kind.count)


def vpdpbusd(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """VNNI's, which cannot saturate."""
    name = f"llvm.x86.avx512.vpdpbusd.{WIDTH * 8}"
    return call(builder, name, INTS, total, builder.bitcast(u, INTS), builder.bitcast(s, INTS))


def sdot(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """ARM's, of two signed operands: packed codes are at most 63, or signed."""
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS, total, u, s)


def sums_of_pairs(builder: ir.IRBuilder, u: ir.Value, s: ir.Value) -> ir.Value:
    """Sums of two u8 * s8 products each in 16-bit lanes, which they must fit; AVX2."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, u, s)


def add_pairs(builder: ir.IRBuilder, total: ir.Value, pairs: ir.Value) -> ir.Value:
    """Add two neighbouring 16-bit lanes to each 32-bit one; AVX2."""
    fours = call(builder, "llvm.x86.avx2.pmadd.wd", INTS, pairs, constant(WORDS, 1))
    return builder.add(total, fours)


def vpmaddubsw(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """AVX2's two instructions: pairs of products must fit 16 bits, as 2 * 127 * 127 does."""
    return add_pairs(builder, total, sums_of_pairs(builder, u, s))


DOTS: dict[str, Dot] = {"vpdpbusd": vpdpbusd, "sdot": sdot, "vpmaddubsw": vpmaddubsw}
"""By the name that a path has it under."""


def dot(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """The path's."""
    return DOTS[PATH.dot](builder, total, u, s)


def starts(
    builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, last: ir.Value, count: int
) -> list[ir.Value]:
    """Addresses base, base + stride, ...; those above the last one repeat it."""
    found = [base]
    for i in range(1, count):
        inside = builder.icmp_signed("<=", LONG(i), last)
        found.append(builder.select(inside, builder.add(found[-1], stride), found[-1]))
    return found


def load(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """Load WIDTH bytes from base + offset."""
    return builder.load(pointer(builder, builder.add(base, offset), BYTES), align=1)


def fetch_line(builder: ir.IRBuilder, line: ir.Value, ahead: tuple[int, int]) -> None:
    """Ask for a line of 64 bytes so many bytes further on, in the second and the first cache."""
    for distance, cache in zip(ahead, (2, 1), strict=True):
        if distance:
            prefetch(builder, builder.add(line, LONG(distance)), cache)


def fetch_ternary(builder: ir.IRBuilder, line: ir.Value) -> None:
    """Ask ahead for a line of ternary tiles, whose digits take most of the time."""
    by_words = PATH.fetch.words if BY_WORDS else None
    fetch_line(builder, line, by_words or PATH.fetch.ternary)


def fetch_unit(builder: ir.IRBuilder, unit: ir.Value, lines: int) -> None:
    """Ask ahead for the lines of a unit of codes, which take little time.

    Or for one line in eight: one in two, as units of two lines would have it, halves Zen 4's speed.
    """
    if PATH.fetch.sparse:
        at = builder.add(unit, LONG(PATH.fetch.codes[0]))
        prefetch(builder, builder.and_(at, LONG(-SPARSE)))
        return
    for i in range(lines):
        fetch_line(builder, builder.add(unit, LONG(i * LINE)), PATH.fetch.codes)
