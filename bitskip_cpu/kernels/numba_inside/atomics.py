"""Atomics and waiting, for the threads that share a job (compiled runs only).

Addresses are of int64. Everything is sequentially consistent: a job costs a handful of these.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitskip_cpu import isa
from bitskip_cpu.native import SLEEP, SLEEP_UNIT

LONG, INT = ir.IntType(64), ir.IntType(32)


def _long_pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, LONG.as_pointer())


@intrinsic
def read(typing: Any, address: Any) -> Any:
    """The value there."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_long_pointer(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def write(typing: Any, address: Any, value: Any) -> Any:
    """Put a value there."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _long_pointer(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add(typing: Any, address: Any, value: Any) -> Any:
    """Add to what is there; the value before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = _long_pointer(builder, args[0])
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put a value there if the expected one is found; whether it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = _long_pointer(builder, args[0])
        pair = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the CPU that this is a waiting loop."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if isa.ARM64:
            name, operands = "llvm.aarch64.hint", [INT(1)]  # yield
        elif "x86_64" in llvm.get_process_triple():
            name, operands = "llvm.x86.sse2.pause", []
        else:
            return context.get_dummy_value()
        kind = ir.FunctionType(ir.VoidType(), [INT] * len(operands))
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def sleep(typing: Any, microseconds: Any) -> Any:
    """Give the CPU away for about that long (0: only to who waits for it)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        units = builder.trunc(builder.sdiv(args[0], LONG(SLEEP_UNIT)), INT)
        kind = ir.FunctionType(INT, [INT])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, SLEEP), [units])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
