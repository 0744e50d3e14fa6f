"""Numba's compiler, stopped before it makes code executable; LLVM sees each kernel once.

Numba optimizes and generates machine code for every function on its own, together with all that it
calls: a deep forward pass would be compiled about ten times over. Here a kernel is only typed and
lowered; all are linked and optimized once, inside the outermost function that calls them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, event
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    IRProcessing,
    ReconstructSSA,
    TranslateByteCode,
)
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from bitskip_cpu.kernels.numba_inside.emit import BYTE, INT, LONG

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

STEPS = (
    TranslateByteCode, FixupArgs, IRProcessing, DeadBranchPrune, ReconstructSSA,
    NopythonTypeInference, PreLowerStripPhis, IRLegalization, NativeLowering, NoPythonBackend,
)  # fmt: skip
"""Numba's, without those for what no kernel has: closures, arrays as expressions, parallel loops,
`with`, messages: a sixth of its work."""

LLVM = 0.5
"""LLVM's work on a whole, as a share of Numba's on its kernels (measured: 1.9 of 6 s in `run`)."""

OPTIONS = {
    "error_model": "numpy",  # a division by zero gives an infinity, not a branch to an exception
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "_nrt": False,  # no reference counts: nothing is ever allocated
}


class LinkedLibrary(JITCodeLibrary):
    """Code to link into others: neither optimized as a whole nor made executable."""

    def _optimize_functions(self, module: llvm.ModuleRef) -> None:
        """The whole's optimizer begins with the same passes: a sixth of all compiling."""
        module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        """Nothing more is added. What it calls is linked when the outermost function is."""
        self._finalized = True

    def _get_module_for_linking(self) -> llvm.ModuleRef:
        """For callers that Numba compiles in its usual way, as tests do."""
        if self._shared_module is None:  # type: ignore[has-type]
            whole = self._final_module.clone()
            _mergeable(whole)
            _link_called(self, whole)
            self._shared_module = whole
        return self._shared_module  # type: ignore[has-type]

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        return _NoEnvironment


class _NoEnvironment:
    @staticmethod
    def set_env(name: str, environment: Any) -> None:
        """There is no code in memory whose pointer to Python objects could be set."""


class _WholeLibrary(LinkedLibrary):
    """Code with all that it calls: optimized, but not made executable here."""

    def finalize(self) -> None:
        _link_called(self, self._final_module)
        self._optimize_final_module()
        self._final_module.verify()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()  # Numba asks when everything is in
        return 0


def _mergeable(module: llvm.ModuleRef) -> None:
    """Let a module's functions be found twice, and be gone once all calls are inlined."""
    for function in module.functions:
        if not function.is_declaration and function.linkage == llvm.Linkage.external:
            function.linkage = "linkonce_odr"


def _link_called(library: JITCodeLibrary, whole: llvm.ModuleRef) -> None:
    for other in _called(library, set()):
        _mergeable(other._final_module)
        whole.link_in(other._final_module, preserve=True)


def _called(library: JITCodeLibrary, seen: set[JITCodeLibrary]) -> Iterator[JITCodeLibrary]:
    """All that a library calls, directly or not, each once."""
    for other in library._linking_libraries:
        if other not in seen:
            seen.add(other)
            yield other
            yield from _called(other, seen)


class _KernelCompiler(Compiler):
    """Numba's compiler with another kind of library."""

    library: type[JITCodeLibrary] = LinkedLibrary

    def define_pipelines(self) -> Any:
        """The steps that a kernel needs, into a library of that kind."""
        if self.state.library is None:
            codegen = self.state.targetctx.codegen()
            self.state.library = self.library(codegen, self.state.func_id.func_qualname)
        steps = PassManager("kernel")
        for step in STEPS:
            steps.add_pass(step, step.__name__)
        steps.finalize()
        return [steps]


class _WholeCompiler(_KernelCompiler):
    library = _WholeLibrary


def linked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel: typed and lowered when something that is compiled calls it."""
    dispatcher = njit(**OPTIONS, pipeline_class=_KernelCompiler)(function)
    template = dispatcher.get_call_template
    # One variant serves every constant that an integer argument may be.
    dispatcher.get_call_template = lambda args, kws: template(list(map(types.unliteral, args)), kws)
    return dispatcher  # type: ignore[no-any-return]


def structs(item: types.Type) -> Callable[[Any, Any], Any]:
    """A function (address, n) -> array of n structs there (`views`), without reference counts."""
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


def _at(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Call what is at the address that comes first, with the other arguments."""
    # Numba's calling convention: a place for the result and one for an exception.
    values = [cgutils.alloca_once(builder, BYTE.as_pointer()) for _ in range(2)]
    values += [builder.ptrtoint(a, LONG) if a.type.is_pointer else a for a in args[1:]]
    kind = ir.FunctionType(INT, [value.type for value in values])
    builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
    return context.get_dummy_value()


@intrinsic
def at_state(typing: Any, address: Any, s: Any, scratch: Any, part: Any) -> Any:
    """Call a piece (`pieces`) of a state."""
    return types.void(types.int64, s, types.int64, types.int64), _at


@intrinsic
def at_product(typing: Any, address: Any, s: Any, p: Any, scratch: Any, part: Any) -> Any:
    """Call a piece of a state and a product."""
    return types.void(types.int64, s, p, types.int64, types.int64), _at


def target() -> tuple[str, str]:
    """Name and features of the CPU that Numba compiles for."""
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return cpu, features


def module(function: Callable[..., None], name: str, arguments: int) -> llvm.ModuleRef:
    """A function of int64 with all that it calls, optimized; its symbol is `name`."""
    dispatcher = njit(**OPTIONS, pipeline_class=_WholeCompiler)(function)
    signature = (types.int64,) * arguments
    dispatcher.compile(signature)
    overload = dispatcher.overloads[signature]
    whole = overload.library._final_module
    whole.get_function(overload.fndesc.llvm_func_name).name = name
    return whole


def object_file(whole: llvm.ModuleRef) -> bytes:
    """A module's machine code for `target`."""
    return bytes(cpu_target.target_context.codegen()._tm.emit_object(whole))


def work(function: Callable[..., None]) -> dict[Any, int]:
    """The function and all kernels that it calls, directly or not: code -> its length in bytes."""
    found: dict[Any, int] = {}
    waiting = [function]
    while waiting:
        reached = waiting.pop()
        code = reached.__code__
        if code not in found:
            found[code] = len(code.co_code)
            named = [reached.__globals__.get(name) for name in code.co_names]
            named += [cell.cell_contents for cell in reached.__closure__ or ()]
            waiting += [f for value in named if (f := getattr(value, "py_func", None))]
    return found


class Counting(event.Listener):
    """While this is entered, `progress` is told how much of a function is compiled."""

    def __init__(self, function: Callable[..., None], progress: Progress) -> None:
        self.progress, self.left = progress, work(function)
        self.total, self.done = (1 + LLVM) * sum(self.left.values()), 0

    def on_start(self, event: Any) -> None:
        pass

    def on_end(self, event: Any) -> None:
        compiled = getattr(event.data.get("dispatcher"), "py_func", None)
        self.done += self.left.pop(getattr(compiled, "__code__", None), 0)
        self.progress(self.done / self.total)

    def __enter__(self) -> None:
        self.collecting = gc.isenabled()
        gc.disable()  # an eighth of the time, and nothing to be found
        event.register("numba:compile", self)

    def __exit__(self, *error: object) -> None:
        event.unregister("numba:compile", self)
        if self.collecting:
            gc.enable()
        self.progress(1.0)
