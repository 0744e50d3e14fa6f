"""The kernels' machine code into this process, without Numba: loading takes 5 ms, Numba 400."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import llvmlite.binding as llvm

# Sleeping is the operating system's. The code refers to it by a name of ours.
SLEEP = "bitskip_sleep"
if sys.platform == "win32":
    _sleep = ctypes.WinDLL("kernel32").Sleep
    SLEEP_UNIT = 1000  # microseconds
else:
    _sleep = ctypes.CDLL(None).usleep
    SLEEP_UNIT = 1
llvm.add_symbol(SLEEP, ctypes.cast(_sleep, ctypes.c_void_p).value)

KNOWN = {SLEEP, "memset", "memcpy", "memmove", "sqrt", "sqrtf"}
"""What kernels may refer to: LLVM ends the process if it does not find a name."""

_engines: list[llvm.ExecutionEngine] = []  # they own the memory that code lies in


def address(code: bytes, symbol: str) -> int:
    """Where a function lies that is in an object file for this machine (`kernels.object_code`).

    The file must be whole: LLVM does not check it.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)  # type: ignore[no-any-return]


def load(code: bytes, symbol: str, arguments: int) -> Callable[..., None]:
    """The function at that `address`, of so many int64; it runs without the interpreter's lock."""
    # Numba's calling convention: a place for the result (None) and one for an exception (never).
    places = (ctypes.c_void_p * 2)()
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * arguments
    )
    at = ctypes.addressof(places)
    function = partial(kind(address(code, symbol)), at, at + 8)
    function.places = places  # type: ignore[attr-defined]  # kept as long as the function
    return function
