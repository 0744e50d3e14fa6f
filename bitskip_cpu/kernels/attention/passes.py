"""What attention does with cached keys and values, float32 or float16 (SPEC 6.2, 6.3, 6.5).

For numbers of each size, 4 or 2 bytes, there is a function of its own, as a cache holds but one
kind: (queries, query, query stride, cached, pitch, soon, out, out stride). 1 to 4 queries, whose
arrays of floats and whose results lie `stride` bytes apart; LANES cached numbers at a time, the
next ones `pitch` numbers further. They are read and converted once for all queries; meanwhile the
function prefetches from `soon` (0: nothing).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.arithmetic.float16 import load_float16s
from bitskip_cpu.kernels.arithmetic.lanes import load_lanes, load_splat, paired, store_lanes
from bitskip_cpu.kernels.layout import CACHED_FLOAT16, LANES, QUERIES
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic
from bitskip_cpu.kernels.numba_inside.emit import LONG, prefetch
from bitskip_cpu.kernels.numba_inside.views import float16s, floats

Kernel = Callable[..., None]
Emit = Callable[[ir.IRBuilder, int, bool, Sequence[ir.Value]], None]
CASES = tuple(itertools.product(range(1, QUERIES + 1), (False, True)))


def _products(leaves: int, size: int) -> Kernel:
    def products(
        queries: int, q_at: int, q_stride: int, k_at: int, pitch: int, soon: int, out_at: int,
        out_stride: int,
    ) -> None:  # fmt: skip
        for i in range(queries):
            q = floats(q_at + i * q_stride, leaves)
            p = [q[j] * _numbers(size, k_at + j * pitch * size) for j in range(leaves)]
            floats(out_at + i * out_stride, LANES)[:] = paired(p)

    return products


def _weighed(size: int) -> Kernel:
    def weighed(
        queries: int, e_at: int, e_stride: int, v_at: int, pitch: int, soon: int, out_at: int,
        out_stride: int,
    ) -> None:  # fmt: skip
        for i in range(queries):
            e = floats(e_at + i * e_stride, LANES)
            parts = [e[j] * _numbers(size, v_at + j * pitch * size) for j in range(LANES)]
            floats(out_at + i * out_stride, LANES)[:] = paired(parts)

    return weighed


def _numbers(size: int, at: int) -> Any:
    """LANES cached numbers as floats."""
    if size == CACHED_FLOAT16:
        return float16s(at, LANES).view(np.float16).astype(np.float32)
    return floats(at, LANES)


def _emit_products(leaves: int, size: int) -> Emit:
    def emit(builder: ir.IRBuilder, queries: int, cold: bool, args: Sequence[ir.Value]) -> None:
        q, q_stride, k, pitch, soon, out, out_stride = args
        query_at = [q]
        for _ in range(queries - 1):
            query_at.append(builder.add(query_at[-1], q_stride))

        def sums(first: int, count: int) -> list[ir.Value]:
            """Per query the sum of `count` leaves; a branch is done before the next is begun."""
            if count > 8:
                left, right = sums(first, count // 2), sums(first + count // 2, count // 2)
                return [builder.fadd(a, b) for a, b in zip(left, right, strict=True)]
            keys, found = [], []
            for j in range(first, first + count):
                offset = builder.mul(pitch, LONG(j * size))
                if cold:
                    prefetch(builder, builder.add(soon, offset), PATH.fetch.scattered)
                keys.append(_load(builder, size, builder.add(k, offset)))
            for base in query_at:
                products = []
                for j, key in enumerate(keys, first):
                    x = load_splat(builder, builder.add(base, LONG(4 * j)))
                    products.append(builder.fmul(x, key))
                found.append(paired(products, builder.fadd))
            return found

        for total in sums(0, leaves):
            store_lanes(builder, total, out)
            out = builder.add(out, out_stride)

    return emit


def _emit_weighed(size: int) -> Emit:
    def emit(builder: ir.IRBuilder, queries: int, cold: bool, args: Sequence[ir.Value]) -> None:
        e, e_stride, v, pitch, soon, out, out_stride = args
        values = []
        for j in range(LANES):
            offset = builder.mul(pitch, LONG(j * size))
            if cold:
                prefetch(builder, builder.add(soon, offset), PATH.fetch.scattered)
            values.append(_load(builder, size, builder.add(v, offset)))
        for _ in range(queries):
            products = []
            for j, value in enumerate(values):
                x = load_splat(builder, builder.add(e, LONG(4 * j)))
                products.append(builder.fmul(x, value))
            store_lanes(builder, paired(products, builder.fadd), out)
            e, out = builder.add(e, e_stride), builder.add(out, out_stride)

    return emit


def _load(builder: ir.IRBuilder, size: int, at: ir.Value) -> ir.Value:
    return (load_float16s if size == CACHED_FLOAT16 else load_lanes)(builder, at)


def _pass(twin: Kernel, emit: Emit) -> Kernel:
    """Code for each of CASES, and a branch to it."""

    @intrinsic(twin)
    def passed(builder, queries, query, stride, cached, pitch, soon, out, out_stride):
        end = builder.append_basic_block("end")
        cold = builder.zext(builder.icmp_signed("!=", soon, LONG(0)), LONG)
        chosen = builder.switch(builder.or_(queries, builder.shl(cold, LONG(8))), end)
        for count, asks in CASES:
            here = builder.append_basic_block(f"{count}_queries")
            chosen.add_case(LONG(count | asks << 8), here)
            builder.position_at_end(here)
            emit(builder, count, asks, (query, stride, cached, pitch, soon, out, out_stride))
            builder.branch(end)
        builder.position_at_end(end)

    return passed


def products(leaves: int, size: int) -> Kernel:
    """out = sum 2.2 over 8 or 64 features of q * k, in the order of `key_slots`, of LANES
    positions."""
    return _pass(_products(leaves, size), _emit_products(leaves, size))


def weighed(size: int) -> Kernel:
    """out = sum 2.3 over LANES positions of e * v, of LANES features."""
    return _pass(_weighed(size), _emit_weighed(size))
