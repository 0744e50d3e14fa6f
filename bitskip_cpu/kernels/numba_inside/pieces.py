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


def piece(function: Callable[..., None], name: str = "") -> Callable[..., None]:
    """A kernel (s, scratch, part) or (s, p, scratch, part), p one of the products, compiled apart.

    Kernels call it as (its address, s, scratch, part), so that it need not be there before it is
    wanted. Where each kernel is compiled with its callers (plain, interpreted), the address is not
    looked at.
    """
    inner = kernel(function)
    structs = function.__code__.co_argcount - 2
    if INTERPRETED or numba_inside.plain:

        def with_state(_: Any, s: Any, scratch: Any, part: Any) -> None:
            inner(s, scratch, part)

        def with_product(_: Any, s: Any, p: Any, scratch: Any, part: Any) -> None:
            inner(s, p, scratch, part)

        return kernel(with_state if structs == 1 else with_product)

    def of_state(state_at: Any, scratch: Any, part: Any) -> None:
        inner(state_structs(state_at, 1)[0], scratch, part)

    def of_product(state_at: Any, product_at: Any, scratch: Any, part: Any) -> None:
        inner(state_structs(state_at, 1)[0], product_structs(product_at, 1)[0], scratch, part)

    PIECES[name or function.__name__] = of_state if structs == 1 else of_product
    from bitskip_cpu.kernels.numba_inside import compile as inside

    return inside.at_state if structs == 1 else inside.at_product  # type: ignore[no-any-return]
