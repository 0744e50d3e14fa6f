"""Exact integer products of 8-bit codes as LLVM IR (SPEC 4.3, 4.4).

Every kernel multiplies unsigned bytes by signed bytes and adds groups of four products to 32-bit
lanes; the paths differ only in the register width and in `dot`, the instruction for that:

    dotprod            sdot, of two signed operands: packed codes are at most 63, or signed
    vnni512, vnni256   vpdpbusd, which cannot saturate
    avx2               vpmaddubsw, vpmaddwd: pairs of products must fit 16 bits, 2 * 127 * 127 does
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.numba_inside.emit import BYTE, INT, LONG, WORD, call, pointer, prefetch

FAR, NEAR = 8192, 1280  # bytes; measured
WIDTH = {"vnni256": 32, "avx2": 32, "dotprod": 16}.get(PATH, 64)  # bytes in a register
BYTES = ir.VectorType(BYTE, WIDTH)
WORDS = ir.VectorType(WORD, WIDTH // 2)
INTS = ir.VectorType(INT, WIDTH // 4)


def splat(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector of equal constants."""
    return ir.Constant(kind, [value] * kind.count)


def dot(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """total int32 lanes + sums of four u8 * s8 products each."""
    if PATH == "avx2":
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, u, s)
        fours = call(builder, "llvm.x86.avx2.pmadd.wd", INTS, pairs, splat(WORDS, 1))
        return builder.add(total, fours)
    if PATH == "dotprod":
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS, total, u, s)
    name = f"llvm.x86.avx512.vpdpbusd.{WIDTH * 8}"
    return call(builder, name, INTS, total, builder.bitcast(u, INTS), builder.bitcast(s, INTS))


def starts(
    builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, last: ir.Value, count: int
) -> list[ir.Value]:
    """base, base + stride, ...; those above the last one repeat it."""
    found = [base]
    for i in range(1, count):
        inside = builder.icmp_signed("<=", LONG(i), last)
        found.append(builder.select(inside, builder.add(found[-1], stride), found[-1]))
    return found


Tile = Callable[..., None]


def load(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """WIDTH bytes at base + offset."""
    return builder.load(pointer(builder, builder.add(base, offset), BYTES), align=1)


def fetch_ahead(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> None:
    """Ask for the bytes FAR further on in the second cache, NEAR further on in the first.

    Without it, memory is read at half its speed.
    """
    at = builder.add(base, offset)
    for distance, level in ((FAR, 2), (NEAR, 3)):
        prefetch(builder, builder.add(at, LONG(distance)), level)
