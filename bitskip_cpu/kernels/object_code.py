"""The outermost kernels as machine code that depends on neither Python nor Numba.

Numba types and lowers an outermost function with all the kernels that it calls and optimizes it as
a whole; the object file that becomes of it is kept on disk and loaded by `bitskip_cpu.native`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba import njit, types
from numba.core import event
from numba.core.codegen import JITCodeLibrary
from numba.core.registry import cpu_target

from bitskip_cpu import isa
from bitskip_cpu.kernels.forward import run
from bitskip_cpu.kernels.numba_inside.decorators import KernelCompiler, LinkedLibrary
from bitskip_cpu.kernels.products.repack import repack
from bitskip_cpu.native import KNOWN

Progress = Callable[[int], None]
"""Called with the number of functions compiled so far."""

FUNCTIONS: dict[str, Callable[..., None]] = {"run": run, "repack": repack}
"""All their arguments are int64."""


class _WholeLibrary(LinkedLibrary):
    """Code with all that it calls: optimized, but not made executable here."""

    def _optimize_final_module(self) -> None:
        JITCodeLibrary._optimize_final_module(self)

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()  # Numba asks when everything is in
        return 0


class _WholeCompiler(KernelCompiler):
    library = _WholeLibrary


def module(name: str, arguments: int) -> llvm.ModuleRef:
    """One of FUNCTIONS with all that it calls, optimized, as an LLVM module; its symbol is `name`.

    Raises RuntimeError if it refers to what `bitskip_cpu.native` does not know.
    """
    dispatcher = njit(
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        _nrt=False,  # no reference counts: nothing is ever allocated
        pipeline_class=_WholeCompiler,
    )(FUNCTIONS[name])
    signature = (types.int64,) * arguments
    dispatcher.compile(signature)
    overload = dispatcher.overloads[signature]
    whole = overload.library._final_module
    whole.get_function(overload.fndesc.llvm_func_name).name = name
    named = {f.name for f in whole.functions if f.is_declaration}
    foreign = {f for f in named if not f.startswith("llvm.")} - KNOWN
    if foreign:
        raise RuntimeError(f"the kernel {name} refers to {', '.join(sorted(foreign))}")
    return whole


def machine_code(name: str, arguments: int, progress: Progress) -> bytes:
    """One of FUNCTIONS as an object file for the CPU that Numba compiles for."""
    codegen = cpu_target.target_context.codegen()
    _, cpu, features = codegen.magic_tuple()
    isa.check(cpu, features)
    collecting = gc.isenabled()
    gc.disable()  # an eighth of the time, and nothing to be found
    try:
        with event.install_listener("numba:compile", _Counter(progress)):
            return codegen._tm.emit_object(module(name, arguments))
    finally:
        if collecting:
            gc.enable()


class _Counter(event.Listener):
    def __init__(self, progress: Progress) -> None:
        self.progress, self.done = progress, 0

    def on_start(self, event: Any) -> None:
        pass

    def on_end(self, event: Any) -> None:
        self.done += 1
        self.progress(self.done)
