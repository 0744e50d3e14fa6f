"""Atomics and waiting, for the threads that share a stage (compiled runs only), and prefetch.

Addresses are of int64. What a thread wrote before `write` or `exchange` is seen by who reads that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from bitskip_cpu import isa
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic
from bitskip_cpu.kernels.numba_inside.emit import INT, LONG, call, loop, pointer, prefetch
from bitskip_cpu.native import SLEEP, SLEEP_UNIT


@intrinsic(returns="int64")
def read(builder, address):
    """The value there."""
    return builder.load_atomic(pointer(builder, address, LONG), "acquire", 8)


@intrinsic()
def write(builder, address, value):
    """Put a value there; nobody waits until others see it."""
    builder.store_atomic(value, pointer(builder, address, LONG), "release", 8)


@intrinsic(returns="int64")
def add(builder, address, value):
    """Add to what is there; the value before."""
    return builder.atomic_rmw("add", pointer(builder, address, LONG), value, "seq_cst")


@intrinsic(returns="boolean")
def exchange(builder, address, expected, value):
    """Put a value there if the expected one is found; whether it was."""
    at = pointer(builder, address, LONG)
    pair = builder.cmpxchg(at, expected, value, "seq_cst", "seq_cst")
    return builder.extract_value(pair, 1)


@intrinsic()
def pause(builder):
    """Tell the CPU that this is a waiting loop."""
    if isa.ARM64:
        call(builder, "llvm.aarch64.hint", ir.VoidType(), INT(1))  # yield
    elif "x86_64" in llvm.get_process_triple():
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


def _nothing(address: int, lines: int) -> None:
    """What asking for memory is without JIT."""


def fetching(cache: int) -> Callable[..., Any]:
    """(address, lines): ask for cache lines from there on in that cache; nothing else comes of it.

    The cache is the first or the second.
    """

    @intrinsic(_nothing)
    def asked_for(builder, address, lines):
        with loop(builder, lines) as index:
            prefetch(builder, builder.add(address, builder.shl(index, LONG(6))), cache)

    return asked_for


fetch = fetching(2)
fetch_scattered = fetching(isa.PATH.fetch.scattered)  # what lies far from what was read before


@intrinsic()
def touch(builder, address, lines):
    """Read cache lines from there on: a CPU that is late leaves out some that are asked for."""
    with loop(builder, lines) as index:
        at = builder.add(address, builder.shl(index, LONG(6)))
        builder.load_atomic(pointer(builder, at, LONG), "monotonic", 8)


@intrinsic()
def sleep(builder, microseconds):
    """Sleep about that long; 0: yield the CPU."""
    units = builder.trunc(builder.sdiv(microseconds, LONG(SLEEP_UNIT)), INT)
    call(builder, SLEEP, INT, units)
