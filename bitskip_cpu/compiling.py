"""Compiling the kernels once per machine: where the result is kept, and whether it is there.

The folder's name hashes every source that shapes the code, the versions of Numba and llvmlite, the
CPU and the path. What is in it is loaded without Numba (`native`), which is imported only to
compile; files that others could have written are not (`trusted`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Collection
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from bitskip.places import user_cache
from bitskip_cpu import beside, isa, native, shipped, sources, trusted
from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.files import replace_file

Progress = Callable[[float], None]
"""Called with the share of the compiling that is done, 0 to 1."""

ATTEND = {kind: f"attend_{kind}" for kind in KV_CACHES}
"""Kind of cache -> the piece that is attention over it."""

LINEAR = {"ternary": "packed_rows", "int8": "code_rows", "float32": "float_rows"}
"""Kind of linear layers -> the piece that is rows of their products."""

ARGUMENTS = {
    "run": 5, "repack": 7, "measure": 3, "contend": 3, "choose": 3,
    **dict.fromkeys(ATTEND.values(), 3),
    "float_rows": 4, "code_rows": 4, "packed_rows": 4,
}  # fmt: skip
"""All compiled code (`kernels.object_code`), with the number of its arguments: what Python calls,
then pieces, which are compiled when something at hand needs them.

One process compiles from the first on, one from the last on, till they meet (`beside`): the largest
stand at the ends.
"""

CALLED = "run", "repack"
"""What Python calls; pieces are called by their addresses."""


def rows_of(config: ModelConfig) -> tuple[str, str]:
    """The pieces that are rows of the linear layers' products, and of the vocabulary's."""
    head = "code_rows" if config.head_format in HEAD_BITS else "float_rows"
    return LINEAR[config.linear], head


def needed(config: ModelConfig, kv_cache: str) -> list[str]:
    """What every text takes of a model with such caches."""
    return [*CALLED, *rows_of(config), *filter(None, [ATTEND.get(kv_cache)])]


LONGEST = 300  # characters of a library's message; Numba's tell the cause after a few
DIGEST = 32  # bytes of the checksum before the code


def cache_folder() -> Path:
    """Where compiled kernels belong."""
    return user_cache() / f"kernels-{_fingerprint()}"


def cache_directory() -> Path | None:
    """`cache_folder`, made if need be; None if it cannot be written, or others could write it."""
    folder = cache_folder()
    return folder if trusted.writable_folder(folder) else None


def cache_refusal() -> str:
    """Why compiled kernels cannot be kept: a part of a line, with the folder."""
    folder = cache_folder()
    return f"{folder} {trusted.refusal(folder) or KERNELS.refused}"


def _fingerprint() -> str:
    words = [llvmlite.__version__, np.__version__, llvm.get_process_triple()]
    words += [isa.cpu_name(), *sorted(isa.cpu_features())]
    digest = hashlib.sha256("\n".join(words).encode())
    found = find_spec("numba")
    if found and found.origin:  # its version, without the time to import it
        digest.update((Path(found.origin).parent / "_version.py").read_bytes())
    digest.update(sources.digest().encode())
    return digest.hexdigest()[:16]


class Kernels:
    """The compiled functions. Nothing is compiled or loaded before it is needed."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., None]] = {}
        self._pieces: dict[str, int] = {}
        self._codes: dict[str, bytes] = {}  # made here, or read
        self._plain = isa.INTERPRETED  # each kernel then calls the others as Python or Numba does
        self.refused = ""  # why a compiled kernel could not be kept

    @cached_property
    def _folder(self) -> Path:
        return cache_folder()

    @cached_property
    def directory(self) -> Path | None:
        """Where compiled kernels are kept; None: nowhere, they are compiled in every process."""
        return None if isa.INTERPRETED else cache_directory()

    @property
    def shipped(self) -> bool:
        """Whether the package brought them all, so that no cache is needed."""
        return all(shipped.code(name) for name in ARGUMENTS)

    def lacking(self, names: Collection[str] = tuple(ARGUMENTS)) -> list[str]:
        """Which of these must be compiled."""
        if self._plain:
            return []
        return [n for n in ARGUMENTS if n in names and not self._stored(n)]

    def prepare(self, names: Collection[str], progress: Progress = lambda _: None) -> None:
        """Compile which of these are `lacking`."""
        lacking = self.lacking(names)
        if not lacking:
            return
        try:
            self._make(lacking, progress)
        except Exception as error:
            if self._functions or not _insides_changed(error):
                raise
            _go_plain(error)
            self._plain = True

    @property
    def run(self) -> Callable[..., None]:
        """`kernels.forward`'s function, compiled; see there for its arguments."""
        return self.function("run")

    @property
    def repack(self) -> Callable[..., None]:
        """`kernels.repack`'s function, compiled; see there for its arguments."""
        return self.function("repack")

    def function(self, name: str) -> Callable[..., None]:
        """One of CALLED, loaded, and compiled before if need be."""
        if name not in self._functions:
            self.prepare([name])
            if self._plain:
                self._functions[name] = _plain(name)
            else:
                code = self._stored(name) or b""
                self._functions[name] = native.load(code, name, ARGUMENTS[name])
        return self._functions[name]

    def piece(self, name: str) -> int:
        """Where one of the pieces lies; compiled before if need be. 0 where it is not apart."""
        if name not in self._pieces:
            self.prepare([name])
            if self._plain:
                return 0
            self._pieces[name] = native.address(self._stored(name) or b"", name)
        return self._pieces[name]

    def _stored(self, name: str) -> bytes | None:
        """A piece: made here, the package's, or in the cache, if it is whole and nobody else's.

        Read once: many ask, and reading checks every byte.
        """
        if name not in self._codes and (code := shipped.code(name) or self._cached(name)):
            self._codes[name] = code
        return self._codes.get(name)

    def _cached(self, name: str) -> bytes | None:
        content = trusted.read_file(self._folder / name) or b""
        code = content[DIGEST:]
        return code if code and hashlib.sha256(code).digest() == content[:DIGEST] else None

    def _make(self, names: list[str], progress: Progress) -> None:
        """Compile pieces, here and in a second process; keep them, if there is a place."""
        work, done = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)

        def tell(name: str, share: float) -> None:
            done[name] = max(share, done[name])  # what failed there is begun anew here
            progress(sum(work[n] * done[n] for n in names) / max(1, sum(work.values())))

        def make(name: str) -> None:
            code = object_code.machine_code(name, ARGUMENTS[name], partial(tell, name))
            self._keep(name, code)

        with beside.Beside(names, self._folder.name, tell) as second:
            from bitskip_cpu.kernels import object_code  # which takes a while: it has begun

            work |= {name: object_code.work(name) for name in names}
            for name in names:
                if second.mine(name):
                    make(name)
            for name in names:
                if name in self._codes:
                    continue
                if code := second.code(name):
                    self._keep(name, code)
                    tell(name, 1.0)
                else:
                    make(name)

    def _keep(self, name: str, code: bytes) -> None:
        self._codes[name] = code
        if self.directory:
            try:
                with replace_file(self.directory / name) as file:
                    file.write(hashlib.sha256(code).digest() + code)
            except OSError as error:  # a full disk: what is compiled is used, and the user told
                self.directory = None
                self.refused = f"could not hold them ({error.strerror})"


def compile_beside(names: list[str], cache: str, folder: str) -> None:
    """What the second process does (`beside`): object files into a folder, progress to stdout."""
    from bitskip_cpu.kernels import object_code

    if cache_folder().name != cache:  # another path, other sources, another Numba
        sys.exit(1)
    try:
        for name in reversed(names):
            if beside.claim(folder, name):
                tell = partial(print, name, flush=True)
                code = object_code.machine_code(name, ARGUMENTS[name], tell)
                with replace_file(Path(folder) / name) as file:
                    file.write(code)
                tell(1.0)
    except BrokenPipeError:  # the first process was killed: nobody else takes its folder away
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _insides_changed(error: Exception) -> bool:
    """Whether compiling failed by what another version of Numba may have changed."""
    from_numba = type(error).__module__.split(".")[0] == "numba"
    return from_numba or isinstance(error, AttributeError | ImportError | TypeError)


def _go_plain(error: Exception) -> None:
    """From here on kernels are compiled by Numba's public `njit`: the same bits, in every process
    anew."""
    import numba

    from bitskip_cpu.kernels import numba_inside

    print(
        f"Numba {numba.__version__} with llvmlite {llvmlite.__version__} is not the Numba that "
        f"bitskip knows ({type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}): "
        "kernels are compiled by its plain njit in every process, which takes minutes; the results "
        "are the same",
        file=sys.stderr,
    )
    numba_inside.plain = True
    for module in [m for m in sys.modules if m.startswith("bitskip_cpu.kernels.")]:
        if module != numba_inside.__name__:
            del sys.modules[module]  # kernels are declared anew


def _plain(name: str) -> Callable[..., None]:
    """`run` or `repack`, by what calls kernels as Python or Numba does."""
    from bitskip_cpu.kernels.object_code import FUNCTIONS

    if isa.INTERPRETED:
        return FUNCTIONS[name]
    import numba

    function = numba.njit(error_model="numpy", nogil=True)(FUNCTIONS[name])
    function.compile((numba.types.int64,) * ARGUMENTS[name])
    return function  # type: ignore[no-any-return]


KERNELS = Kernels()


def warmup(progress: Progress = lambda _: None, names: Collection[str] = tuple(ARGUMENTS)) -> None:
    """Compile these, or see that they are there; load what Python calls."""
    KERNELS.prepare(names, progress)
    for name in CALLED:
        KERNELS.function(name)
