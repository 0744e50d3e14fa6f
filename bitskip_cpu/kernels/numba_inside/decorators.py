"""`kernel` and `intrinsic`: functions that only compiled functions call.

Numba optimizes and generates machine code for every function on its own, together with all that it
calls; a deep forward pass would be compiled about ten times over. A kernel is only typed and
lowered; LLVM sees it once, inside the outermost function (`object_code`) that calls it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir
from numba import njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from bitskip_cpu.isa import INTERPRETED


class LinkedLibrary(JITCodeLibrary):
    """Code to link into others: neither optimized as a whole nor made executable."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        return _NoEnvironment


class _NoEnvironment:
    @staticmethod
    def set_env(name: str, environment: Any) -> None:
        """There is no code in memory whose pointer to Python objects could be set."""


class KernelCompiler(Compiler):
    """Numba's compiler with another kind of library."""

    library: type[JITCodeLibrary] = LinkedLibrary

    def define_pipelines(self) -> Any:
        """The usual steps, into a library of that kind."""
        if self.state.library is None:
            codegen = self.state.targetctx.codegen()
            self.state.library = self.library(codegen, self.state.func_id.func_qualname)
        return super().define_pipelines()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile as a part of compiled callers; Python code can call it only where JIT is off."""
    if INTERPRETED:
        return function
    return njit(  # type: ignore[no-any-return]
        error_model="numpy",  # a division by zero gives an infinity, not a branch to an exception
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        _nrt=False,  # no reference counts: nothing is ever allocated
        pipeline_class=KernelCompiler,
    )(function)


def intrinsic(
    twin: Callable[..., Any] | None = None, *, returns: str = "void", **kinds: str
) -> Callable[[Callable[..., ir.Value | None]], Callable[..., Any]]:
    """Let kernels call a function that writes its instructions itself.

    The decorated function takes an `ir.IRBuilder` and the arguments as LLVM values. They are int64,
    or what `kinds` says under their names; the result is None, or an LLVM value of type `returns`
    (names of Numba's types: "int32", "float32"). `twin`: what stands for it where JIT is off.
    """

    def decorate(emit: Callable[..., ir.Value | None]) -> Callable[..., Any]:
        if INTERPRETED:
            return twin or emit
        form = inspect.signature(emit)  # the builder stands where Numba has its typing context
        _, *names = form.parameters
        arguments = [getattr(types, kinds.get(name, "int64")) for name in names]
        signature = getattr(types, returns)(*arguments)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            result = emit(builder, *values)
            return context.get_dummy_value() if result is None else result

        def typed(typing: Any, *arguments: Any) -> Any:
            return signature, generate

        typed.__name__, typed.__signature__ = emit.__name__, form  # type: ignore[attr-defined]
        return numba.extending.intrinsic(typed)  # type: ignore[no-any-return]

    return decorate
