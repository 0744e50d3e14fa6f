"""Kernels of packed and unpacked ternary tiles (`ternary_layout`), as LLVM IR (SPEC 4.3).

The 16 rows of a tile are lanes; a column's activation codes are broadcast. The weights' codes are
unsigned bytes 0, 1, 2 and the first operand of `dot`. On AVX2 pairs are summed in 16 bits first, of
up to PAIRS planes: at most 64 * 2 * 2 * 127 = 32512.

A shift costs as much as a product. So with one token codes may stay where they lie in a byte, two
bits up: such sums count four times, and are divided in the end.

Tokens above `last` repeat it, so that a border needs no code of its own; the int32 sums of a
token's 16 rows lie side by side, the next token's `out stride` bytes further.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import INT, LONG, call, loop, pointer, variable
from bitskip_cpu.kernels.products.dot import (
    BYTES,
    INTS,
    WIDTH,
    WORDS,
    Kernel,
    add_pairs,
    constant,
    dot,
    fetch_ternary,
    load,
    starts,
    sums_of_pairs,
)
from bitskip_cpu.kernels.products.ternary_layout import (
    BY_BYTES,
    BY_WORDS,
    COLUMNS,
    LINE,
    LINE_COLUMNS,
    PLANES,
    UNIT_COLUMNS,
    UNIT_LINES,
)

REGISTERS = LINE // WIDTH  # of a line
PAIRS = 64  # planes whose sums of pairs fit 16 bits
QUARTERED = (0, 1) if BY_WORDS else (1, 3)  # planes that `packed_tile` may multiply by four
Line = list[Any]
"""Its registers; by words, what its two numbers look up, for its one register."""


def load_line(builder: ir.IRBuilder, base: ir.Value, offset: int) -> Line:
    """Load the line at base + offset bytes."""
    return [load(builder, base, LONG(offset + h * WIDTH)) for h in range(REGISTERS)]


def shifted(builder: ir.IRBuilder, x: ir.Value, bits: int) -> ir.Value:
    """Shift each byte right; the bits that come in from its neighbour are garbage."""
    words = builder.lshr(builder.bitcast(x, WORDS), constant(WORDS, bits))
    return builder.bitcast(words, BYTES)


def choose(builder: ir.IRBuilder, mask: int, x: ir.Value, y: ir.Value) -> ir.Value:
    """Take the bits of x where the mask has ones, else those of y."""
    return builder.or_(
        builder.and_(x, constant(BYTES, mask)), builder.and_(y, constant(BYTES, 255 - mask))
    )


def unit_lines(builder: ir.IRBuilder, stored: list[Line]) -> list[Line]:
    """All lines of a unit, from those stored for it."""
    if BY_WORDS:
        words = [line[0] for line in stored]
        numbers = [number(builder, word, i) for word in words for i in range(3)]
        return [[look_up(builder, *numbers[i : i + 2])] for i in (0, 2, 4)]
    if not BY_BYTES:
        return stored
    a, b, c, d, e = (line[0] for line in stored)
    more = (
        choose(builder, 7, shifted(builder, a, 5), shifted(builder, d, 3)),
        choose(builder, 7, shifted(builder, b, 5), shifted(builder, e, 3)),
        choose(builder, 7, shifted(builder, c, 5),
               choose(builder, 8, shifted(builder, d, 2), shifted(builder, e, 1))),
    )  # fmt: skip
    return stored + [[x] for x in more]


def tail_line(builder: ir.IRBuilder, line: Line) -> Line:
    """A line of a tail, from how it is stored."""
    if not BY_WORDS:
        return line
    return [look_up(builder, line[0], number(builder, line[0], 1))]


def number(builder: ir.IRBuilder, word: ir.Value, i: int) -> ir.Value:
    """Number i of every word, in its low 5 bits; there is garbage above them."""
    return shifted(builder, word, 5 * i) if i else word


def look_up(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The digits of a line's two numbers: codes of planes 0 and 1, two bits up; below them those
    of plane 2, of the even columns with the first and of the odd ones with the second."""

    def table(low: int, high: int) -> ir.Constant:
        entries = []
        for n in range(32):
            first, second, third = n % 3, n // 3 % 3, min(n // 9, 2)
            entries.append(4 * first + low * third | (4 * second + high * third) << 8)
        return ir.Constant(WORDS, entries)

    name = "llvm.x86.avx512.permvar.hi.512"  # which sees 5 bits of a word
    both = ((table(1, 0), even), (table(0, 1), odd))
    first, second = (
        call(builder, name, WORDS, entries, builder.bitcast(numbers, WORDS))
        for entries, numbers in both
    )
    return builder.bitcast(first, BYTES), builder.bitcast(second, BYTES)


def plane(builder: ir.IRBuilder, x: Any, p: int) -> ir.Value:
    """The codes 0, 1, 2 of one plane of a line's register."""
    if BY_WORDS:
        moved = shifted(builder, x[p], 2) if p in QUARTERED else builder.or_(*x)
        return builder.and_(moved, constant(BYTES, 3))
    if not BY_BYTES:
        moved = shifted(builder, x, 2 * p) if p else x
        return builder.and_(moved, constant(BYTES, 3))
    # The lookup sees 6 bits; the sixth is garbage, hence every entry twice.
    digits = [(min(i & 31, 26) // 3**p) % 3 for i in range(64)]
    table = ir.Constant(BYTES, digits)
    return call(builder, "llvm.x86.avx512.permvar.qi.512", BYTES, table, x)


def plane_times_4(builder: ir.IRBuilder, x: Any, p: int) -> ir.Value:
    """The codes 0, 4, 8 of one plane that is QUARTERED."""
    if BY_WORDS:
        return builder.and_(x[p], constant(BYTES, 12))
    moved = shifted(builder, x, 2 * p - 2) if p > 1 else x  # which the plane before takes, too
    return builder.and_(moved, constant(BYTES, 12))


def planes(
    builder: ir.IRBuilder, lines: list[Line], by_quarters: bool = False
) -> Iterator[tuple[int, list[ir.Value]]]:
    """(first of its 4 columns, codes of the 16 rows) of every plane; four times those QUARTERED."""
    for i, line in enumerate(lines):
        for p in range(PLANES):
            take = plane_times_4 if by_quarters and p in QUARTERED else plane
            yield (i * PLANES + p) * COLUMNS, [take(builder, x, p) for x in line]


def broadcast(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """Repeat 4 activation codes for the 16 rows."""
    at = builder.inttoptr(builder.add(base, offset), INT.as_pointer())
    four = builder.load(at, align=1)
    nothing = ir.Constant(INTS, ir.Undefined)
    first = builder.insert_element(nothing, four, INT(0))
    return builder.bitcast(builder.shuffle_vector(first, nothing, constant(INTS, 0)), BYTES)


class Sums:
    """Accumulators [tokens][registers] in `chains` copies, so that additions need not wait."""

    def __init__(self, builder: ir.IRBuilder, tokens: int, registers: int, chains: int) -> None:
        if WIDTH == 16:  # four registers a line; ARM has 32
            chains = max(1, 16 // (tokens * registers))
        self.builder, self.chains = builder, chains
        self.shape = tokens, registers
        self.totals = [
            [[variable(builder, constant(INTS, 0)) for _ in range(chains)]
             for _ in range(registers)] for _ in range(tokens)
        ]  # fmt: skip
        self.pairs = [
            [variable(builder, constant(WORDS, 0)) for _ in range(registers)]
            for _ in range(tokens if PATH.pairs else 0)
        ]

    def add(self, t: int, r: int, weights: ir.Value, codes: ir.Value, chain: int) -> None:
        """Add products to token t, register r; `chain` is taken modulo their number."""
        builder = self.builder
        if PATH.pairs:
            pairs, before = sums_of_pairs(builder, weights, codes), self.pairs[t][r]
            builder.store(builder.add(builder.load(before), pairs), before)
            return
        total = self.totals[t][r][chain % self.chains]
        builder.store(dot(builder, builder.load(total), weights, codes), total)

    def add_quarters(self, fours: Sums) -> None:
        """Add the sums of `fours`, of products that count four times there: 16-bit ones, if the
        path has them, else 32-bit ones."""
        builder = self.builder
        if not PATH.pairs:
            for t, registers in enumerate(self.totals):
                for mine, total in zip(registers, fours.finished(t), strict=True):
                    once = builder.ashr(total, constant(INTS, 2))  # exact
                    builder.store(builder.add(builder.load(mine[0]), once), mine[0])
            return
        for mine, others in zip(self.pairs, fours.pairs, strict=True):
            for pairs, other in zip(mine, others, strict=True):
                once = builder.ashr(builder.load(other), constant(WORDS, 2))  # exact
                builder.store(builder.add(builder.load(pairs), once), pairs)
                builder.store(constant(WORDS, 0), other)

    def flush(self) -> None:
        """Add 16-bit sums, if the path has them, to the 32-bit ones; after at most PAIRS planes."""
        builder = self.builder
        for totals, by_register in zip(self.totals, self.pairs, strict=False):  # or there are none
            for (total, *_), pairs in zip(totals, by_register, strict=True):
                added = add_pairs(builder, builder.load(total), builder.load(pairs))
                builder.store(added, total)
                builder.store(constant(WORDS, 0), pairs)

    def finished(self, t: int) -> list[ir.Value]:
        """The sums of token t, by register."""
        builder, found = self.builder, []
        for chains in self.totals[t]:
            left = [builder.load(total) for total in chains]
            while len(left) > 1:
                left = [builder.add(a, b) for a, b in zip(left[::2], left[1::2])]  # noqa: B905
            found += left
        return found

    def store(self, out: ir.Value, out_stride: ir.Value) -> None:
        """Store all sums of a token side by side."""
        builder = self.builder
        for t in range(self.shape[0]):
            for r, total in enumerate(self.finished(t)):
                at = builder.add(out, LONG(r * WIDTH))
                builder.store(total, pointer(builder, at, INTS), align=4)
            out = builder.add(out, out_stride)


def over_lines(
    builder: ir.IRBuilder, tiles: list[ir.Value], units: ir.Value, tail: ir.Value, do: Any
):
    """Emit do(tile's number, lines, first column) along tiles, of which each unit in turns: for
    each unit, then for each line of their tails."""
    with loop(builder, units) as index:
        for n, tile in enumerate(tiles):
            at = builder.add(tile, builder.mul(index, LONG(UNIT_LINES * LINE)))
            for i in range(UNIT_LINES):
                fetch_ternary(builder, builder.add(at, LONG(i * LINE)))
            stored = [load_line(builder, at, i * LINE) for i in range(UNIT_LINES)]
            do(n, unit_lines(builder, stored), builder.mul(index, LONG(UNIT_COLUMNS)))
    rest = builder.mul(units, LONG(UNIT_LINES * LINE))
    first = builder.mul(units, LONG(UNIT_COLUMNS))
    with loop(builder, tail) as index:
        for n, tile in enumerate(tiles):
            at = builder.add(builder.add(tile, rest), builder.mul(index, LONG(LINE)))
            fetch_ternary(builder, at)
            column = builder.add(first, builder.mul(index, LONG(LINE_COLUMNS)))
            do(n, [tail_line(builder, load_line(builder, at, 0))], column)


def multiply_packed(
    builder: ir.IRBuilder, tiles: list[ir.Value], units: ir.Value, tail: ir.Value,
    token_at: list[ir.Value], chains: int,
) -> list[Sums]:  # fmt: skip
    """Emit the products of packed tiles with every token; the sums of each.

    With one token QUARTERED planes stay at bits 2 and 3, where that saves shifts.
    """
    tokens = len(token_at)
    by_quarters = tokens == 1 and (PATH.pairs or BY_WORDS)
    sums, fours = ([Sums(builder, tokens, REGISTERS, chains) for _ in tiles] for _ in range(2))

    def multiply(n: int, lines: list[Line], first: ir.Value) -> None:
        for chain, (column, weights) in enumerate(planes(builder, lines, by_quarters)):
            at, to = builder.add(first, LONG(column)), sums[n]
            if by_quarters and chain % PLANES in QUARTERED:
                to = fours[n]
            for t in range(tokens):
                four = broadcast(builder, token_at[t], at)
                for h in range(REGISTERS):
                    to.add(t, h, weights[h], four, chain)
        if PATH.pairs:
            sums[n].add_quarters(fours[n])
            sums[n].flush()

    over_lines(builder, tiles, units, tail, multiply)
    if by_quarters and not PATH.pairs:
        for mine, four in zip(sums, fours, strict=True):
            mine.add_quarters(four)
    return sums


def packed_tile(tokens: int, chains: int) -> Kernel:
    """(tile, units, tail, codes, codes stride, last, out, out stride): 16 rows x tokens."""

    @intrinsic()
    def tile_sums(builder, tile, units, tail, codes, codes_stride, last, out, out_stride):
        token_at = starts(builder, codes, codes_stride, last, tokens)
        (sums,) = multiply_packed(builder, [tile], units, tail, token_at, chains)
        sums.store(out, out_stride)

    return tile_sums


@intrinsic()
def packed_pair(builder, tile, other, units, tail, codes, out, other_out):
    """Sums of two packed tiles, read in turns, with one token."""
    found = multiply_packed(builder, [tile, other], units, tail, [codes], 2)
    for sums, to in zip(found, (out, other_out), strict=True):
        sums.store(to, LONG(0))


@intrinsic()
def unpack_tile(builder, tile, units, tail, out):
    """Unpack a tile's codes into bytes: 64 for every 4 columns, in the order of a line."""

    def unpack(_: int, lines: list[Line], first: ir.Value) -> None:
        for column, weights in planes(builder, lines):
            at = builder.mul(builder.add(first, LONG(column)), LONG(LINE // COLUMNS))
            for h, codes in enumerate(weights):
                to = builder.add(builder.add(out, at), LONG(h * WIDTH))
                builder.store(codes, pointer(builder, to, BYTES), align=1)

    over_lines(builder, [tile], units, tail, unpack)


def bytes_tiles(tiles: int, tokens: int, unroll: int) -> Kernel:
    """(unpacked tiles, stride, last tile, fours, codes, codes stride, last, out, out stride).

    16 * tiles rows x tokens, along `fours` times 4 columns (a multiple of `unroll`).
    """

    @intrinsic()
    def tile_sums(
        builder, tile, stride, last_tile, fours, codes, codes_stride, last, out, out_stride
    ):
        tile_at = starts(builder, tile, stride, last_tile, tiles)
        token_at = starts(builder, codes, codes_stride, last, tokens)
        sums = Sums(builder, tokens, tiles * REGISTERS, 1)

        def multiply(first: ir.Value, count: ir.Value) -> None:
            with loop(builder, builder.udiv(count, LONG(unroll))) as outer:
                for u in range(unroll):
                    index = builder.add(builder.mul(outer, LONG(unroll)), LONG(u))
                    index = builder.add(first, index)
                    at = builder.mul(index, LONG(LINE))
                    weights = [
                        load(builder, builder.add(base, at), LONG(h * WIDTH))
                        for base in tile_at for h in range(REGISTERS)
                    ]  # fmt: skip
                    for t in range(tokens):
                        four = broadcast(builder, token_at[t], builder.mul(index, LONG(COLUMNS)))
                        for r, w in enumerate(weights):
                            sums.add(t, r, w, four, 0)

        if PATH.pairs:
            whole = builder.udiv(fours, LONG(PAIRS))
            with loop(builder, whole) as stretch:
                multiply(builder.mul(stretch, LONG(PAIRS)), LONG(PAIRS))
                sums.flush()
            first = builder.mul(whole, LONG(PAIRS))
            multiply(first, builder.sub(fours, first))
            sums.flush()
        else:
            multiply(LONG(0), fours)
        sums.store(out, out_stride)

    return tile_sums


packed_1, packed_2 = packed_tile(1, 4), packed_tile(2, 4)
packed_3, packed_4 = packed_tile(3, 4), packed_tile(4, 4)
if WIDTH > 16:
    packed_8 = packed_tile(8, 2)
else:  # the sums of 8 tokens would not fit the registers

    @kernel
    def packed_8(tile, units, tail, codes, codes_stride, last, out, out_stride):
        """Sums of 5 to 8 tokens, in two calls."""
        packed_4(tile, units, tail, codes, codes_stride, 3, out, out_stride)
        codes, out = codes + 4 * codes_stride, out + 4 * out_stride
        packed_4(tile, units, tail, codes, codes_stride, last - 4, out, out_stride)


bytes_panel = bytes_tiles(*PATH.panel, 4 if PATH.pairs else 1)
