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
from llvmlite import ir
from numba import carray, from_dtype, types
from numpy.typing import DTypeLike

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels import numba_inside
from bitskip_cpu.kernels.layout import CACHE, PRODUCT, STATE
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import BYTE, INT, LONG, WORD, pointer

View = Callable[[Any, Any], np.ndarray]


def _view(kind: DTypeLike, element: ir.Type = BYTE) -> View:
    """A function (address, n) -> 1-D array of that dtype over existing memory.

    `element`: the LLVM type of a number. Compiled, such an array is a pointer: indices are not
    checked, and do not count from the end. An array of structs is a true one.
    """
    dtype = np.dtype(kind)
    if INTERPRETED:

        def interpreted(address: int, n: int) -> np.ndarray:
            memory: Any = (ctypes.c_byte * (int(n) * dtype.itemsize)).from_address(int(address))
            array = np.frombuffer(memory, dtype)
            return array.view(np.recarray) if dtype.names else array

        return interpreted

    @intrinsic(returns=types.voidptr if dtype.names else types.CPointer(from_dtype(dtype)))
    def compiled(builder, address, n):
        return pointer(builder, address, element)

    return compiled if not dtype.names else _structs(compiled, dtype)


def _structs(at: View, dtype: np.dtype) -> View:
    """The same of structs, which kernels take as one of an array."""
    if numba_inside.plain:

        @kernel
        def array(address, n):
            return carray(at(address, n), n, dtype)

        return array
    from bitskip_cpu.kernels.numba_inside.compile import structs

    return structs(from_dtype(dtype))


floats = _view(np.float32, ir.FloatType())
float64s = _view(np.float64, ir.DoubleType())
int8s = _view(np.int8)
uint8s = _view(np.uint8)
uint16s = _view(np.uint16, WORD)
float16s = uint16s  # their bits
int32s = _view(np.int32, INT)
int64s = _view(np.int64, LONG)
state_structs = _view(STATE)
product_structs = _view(PRODUCT)
cache_structs = _view(CACHE)
