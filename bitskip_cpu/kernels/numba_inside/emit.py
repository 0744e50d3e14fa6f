"""LLVM instructions that intrinsics are made of, beyond those of `ir.IRBuilder`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

BYTE, WORD, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call a function by its name: an LLVM intrinsic, or one that `bitskip_cpu.native` knows."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


@contextmanager
def loop(builder: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """What is written inside runs for an index, the value given, of 0 to count - 1."""
    kind, before = count.type, builder.basic_block
    head, body, end = (builder.append_basic_block(f"loop.{w}") for w in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(kind)
    builder.cbranch(builder.icmp_signed("<", index, count), body, end)
    builder.position_at_end(body)
    yield index
    index.add_incoming(kind(0), before)
    index.add_incoming(builder.add(index, kind(1), flags=["nsw"]), builder.basic_block)
    builder.branch(head)
    builder.position_at_end(end)


def variable(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A place on the stack, made once a call, that holds the value from here on."""
    with builder.goto_entry_block():
        place = builder.alloca(value.type)
    builder.store(value, place)
    return place


def constant_bytes(builder: ir.IRBuilder, name: str, values: bytes) -> ir.Value:
    """A pointer to constant bytes that the code carries with it."""
    kind = ir.ArrayType(BYTE, len(values))
    data = ir.GlobalVariable(builder.module, kind, builder.module.get_unique_name(name))
    data.linkage, data.global_constant = "internal", True
    data.initializer = ir.Constant(kind, bytearray(values))
    return builder.bitcast(data, BYTE.as_pointer())


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """An address as a pointer to an LLVM type."""
    return builder.inttoptr(address, kind.as_pointer())


def prefetch(builder: ir.IRBuilder, address: ir.Value, cache: int = 2) -> None:
    """Ask for the cache line there, in the first cache or the second."""
    at, locality = pointer(builder, address, BYTE), INT(4 - cache)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), at, INT(0), locality, INT(1))  # read, data
