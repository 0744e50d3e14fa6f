"""`kernel` and `intrinsic`: functions that only compiled functions call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir
from numba import njit, types

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels import numba_inside


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile as a part of compiled callers; Python code can call it only where JIT is off."""
    if INTERPRETED:
        return function
    if numba_inside.plain:
        return njit(error_model="numpy", nogil=True)(function)  # type: ignore[no-any-return]
    from bitskip_cpu.kernels.numba_inside.compile import linked

    return linked(function)


def intrinsic(
    twin: Callable[..., Any] | None = None, *, returns: str | types.Type = "void", **kinds: str
) -> Callable[[Callable[..., ir.Value | None]], Callable[..., Any]]:
    """Let kernels call a function that writes its instructions itself.

    The decorated function takes an `ir.IRBuilder` and the arguments as LLVM values. They are int64,
    or what `kinds` says under their names; the result is None, or an LLVM value of type `returns`
    (Numba's types, or their names: "int32", "float32"). `twin`: what stands for it without JIT.
    """

    def decorate(emit: Callable[..., ir.Value | None]) -> Callable[..., Any]:
        if INTERPRETED:
            return twin or emit
        form = inspect.signature(emit)  # the builder stands where Numba has its typing context
        _, *names = form.parameters
        arguments = [getattr(types, kinds.get(name, "int64")) for name in names]
        result = getattr(types, returns) if isinstance(returns, str) else returns
        signature = result(*arguments)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        def typed(typing: Any, *arguments: Any) -> Any:
            return signature, generate

        typed.__name__, typed.__signature__ = emit.__name__, form  # type: ignore[attr-defined]
        return numba.extending.intrinsic(typed)  # type: ignore[no-any-return]

    return decorate
