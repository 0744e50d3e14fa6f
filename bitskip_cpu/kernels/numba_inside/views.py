"""Arrays from addresses.

Kernels take addresses (int64) instead of arrays: one struct of addresses (`layout.STATE`) then
serves every model, every cache and every thread through a single compiled signature, and passing
an array between kernels costs one register. Whoever fills in an address keeps its array alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numpy.typing import DTypeLike

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels.layout import PRODUCT, STATE

View = Callable[[Any, Any], np.ndarray]


def _view(kind: DTypeLike) -> View:
    """A function (address, n) -> 1-D array of that dtype over existing memory."""
    dtype = np.dtype(kind)
    if INTERPRETED:

        def interpreted(address: int, n: int) -> np.ndarray:
            memory: Any = (ctypes.c_byte * (int(n) * dtype.itemsize)).from_address(int(address))
            array = np.frombuffer(memory, dtype)
            return array.view(np.recarray) if dtype.names else array

        return interpreted

    item: types.Type = from_dtype(dtype)
    array = types.Array(item, 1, "C")

    @intrinsic
    def compiled(typing: Any, address: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.get_data_type(item)
            size = context.get_constant(types.intp, context.get_abi_sizeof(data))
            result = context.make_array(array)(context, builder)
            populate_array(
                result,
                data=builder.inttoptr(args[0], data.as_pointer()),
                shape=cgutils.pack_array(builder, [args[1]]),
                strides=cgutils.pack_array(builder, [size]),
                itemsize=size,
                meminfo=None,
            )
            return result._getvalue()

        return array(types.int64, types.int64), codegen

    return compiled  # type: ignore[no-any-return]


floats = _view(np.float32)
float16s = _view(np.uint16)
int8s = _view(np.int8)
uint8s = _view(np.uint8)
int32s = _view(np.int32)
state_structs = _view(STATE)
product_structs = _view(PRODUCT)
