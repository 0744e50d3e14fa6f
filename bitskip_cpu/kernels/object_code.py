"""The outermost kernels as machine code that depends on neither Python nor Numba.

Numba types and lowers an outermost function with all the kernels that it calls and optimizes it as
a whole; the object file that becomes of it is kept on disk and loaded by `bitskip_cpu.native`.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding as llvm

from bitskip_cpu import isa
from bitskip_cpu.kernels.forward import run
from bitskip_cpu.kernels.numba_inside.pieces import PIECES
from bitskip_cpu.kernels.products.repack import repack
from bitskip_cpu.native import KNOWN

FUNCTIONS: dict[str, Callable[..., None]] = {"run": run, "repack": repack, **PIECES}
"""All their arguments are int64."""


def module(name: str, arguments: int) -> llvm.ModuleRef:
    """One of FUNCTIONS with all that it calls, optimized, as an LLVM module; its symbol is `name`.

    Raises RuntimeError if it refers to what `bitskip_cpu.native` does not know.
    """
    from bitskip_cpu.kernels.numba_inside import compile as inside

    whole = inside.module(FUNCTIONS[name], name, arguments)
    named = {f.name for f in whole.functions if f.is_declaration}
    foreign = {f for f in named if not f.startswith("llvm.")} - KNOWN
    if foreign:
        raise RuntimeError(f"the kernel {name} refers to {', '.join(sorted(foreign))}")
    return whole


def work(name: str) -> int:
    """How much there is to compile of one of FUNCTIONS, in the bytes of its kernels' bytecode."""
    from bitskip_cpu.kernels.numba_inside import compile as inside

    return sum(inside.work(FUNCTIONS[name]).values())


def machine_code(name: str, arguments: int, progress: Callable[[float], None]) -> bytes:
    """One of FUNCTIONS as an object file for the CPU that Numba compiles for.

    `progress` is told the share that is done, 0 to 1.
    """
    from bitskip_cpu.kernels.numba_inside import compile as inside

    isa.check(*inside.target())
    with inside.Counting(FUNCTIONS[name], progress):
        return inside.object_file(module(name, arguments))
