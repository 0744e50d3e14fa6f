"""Parts of stages as object code of their own, compiled beside what calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels import numba_inside
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import product_structs, state_structs

PIECES: dict[str, Callable[..., None]] = {}
"""Name -> outermost function of addresses and integers: what `object_code` compiles."""


def piece(function: Callable[..., None]) -> Callable[..., None]:
    """A kernel (s, scratch, part) or (s, p, scratch, part), p one of the products, that kernels
    call by its name, as something compiled elsewhere.

    Where each kernel is compiled with its callers (plain, interpreted), this is such a kernel.
    """
    inner = kernel(function)
    if INTERPRETED or numba_inside.plain:
        return inner

    def of_state(state_at: Any, scratch: Any, part: Any) -> None:
        inner(state_structs(state_at, 1)[0], scratch, part)

    def of_product(state_at: Any, product_at: Any, scratch: Any, part: Any) -> None:
        inner(state_structs(state_at, 1)[0], product_structs(product_at, 1)[0], scratch, part)

    structs = function.__code__.co_argcount - 2
    PIECES[function.__name__] = of_state if structs == 1 else of_product
    from bitskip_cpu.kernels.numba_inside.compile import by_name

    return by_name(function.__name__, structs)
