"""Compiling the kernels once per machine: where the result is kept, and whether it is there.

The folder's name hashes every source that shapes the code, the versions of Numba and llvmlite, the
CPU and the path. What is in it is loaded without Numba (`native`), which is imported only to
compile; files that others could have written are not (`trusted`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from bitskip.places import user_cache
from bitskip_cpu import beside, isa, native, shipped, sources, trusted
from bitskip_ref.files import replace_file

Progress = Callable[[float], None]
"""Called with the share of the compiling that is done, 0 to 1."""

ARGUMENTS = {"run": 5, "packed_rows": 4, "repack": 7, "plain_rows": 4, "attend_part": 3}
"""The pieces of compiled code (`kernels.object_code`), each with the number of its arguments.

One process compiles them from the first on, one from the last on, till they meet (`beside`): the
largest stand at the ends.
"""

CALLED = {"run": ("packed_rows", "plain_rows", "attend_part"), "repack": ()}
"""Those that Python calls, each with the others that it needs."""

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
        self._made: dict[str, bytes] = {}
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

    @property
    def compiled(self) -> bool:
        """Whether everything can start without compiling (always, if interpreted)."""
        if isa.INTERPRETED or self._functions.keys() == CALLED.keys():
            return True
        return all(self._stored(name) for name in ARGUMENTS)

    @property
    def run(self) -> Callable[..., None]:
        """`kernels.forward`'s function, compiled; see there for its arguments."""
        return self.function("run")

    @property
    def repack(self) -> Callable[..., None]:
        """`kernels.repack`'s function, compiled; see there for its arguments."""
        return self.function("repack")

    def function(self, name: str, progress: Progress | None = None) -> Callable[..., None]:
        """One of CALLED, loaded, and compiled before if need be."""
        if name not in self._functions:
            if isa.INTERPRETED:
                from bitskip_cpu.kernels.object_code import FUNCTIONS

                self._functions[name] = FUNCTIONS[name]
            else:
                self._functions[name] = self._loaded(name, progress or (lambda _: None))
        return self._functions[name]

    def _loaded(self, name: str, progress: Progress) -> Callable[..., None]:
        pieces = (name, *CALLED[name])
        if not all(self._stored(piece) for piece in pieces):
            try:
                self._make([n for n in ARGUMENTS if not self._stored(n)], progress)
            except Exception as error:
                if not _insides_changed(error):
                    raise
                return _plain(name, error)
        codes = [self._stored(piece) or b"" for piece in pieces]
        return native.load(codes, name, ARGUMENTS[name])

    def _stored(self, name: str) -> bytes | None:
        """A piece: made here, the package's, or in the cache, if it is whole and nobody else's."""
        if code := self._made.get(name) or shipped.code(name):
            return code
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
                if name in self._made:
                    continue
                if code := second.code(name):
                    self._keep(name, code)
                    tell(name, 1.0)
                else:
                    make(name)

    def _keep(self, name: str, code: bytes) -> None:
        self._made[name] = code
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
    for name in reversed(names):
        if beside.claim(folder, name):
            tell = partial(print, name, flush=True)
            code = object_code.machine_code(name, ARGUMENTS[name], tell)
            with replace_file(Path(folder) / name) as file:
                file.write(code)


def _insides_changed(error: Exception) -> bool:
    """Whether compiling failed by what another version of Numba may have changed."""
    from_numba = type(error).__module__.split(".")[0] == "numba"
    return from_numba or isinstance(error, AttributeError | ImportError | TypeError)


def _plain(name: str, error: Exception) -> Callable[..., None]:
    """One of CALLED by Numba's public `njit`: the same bits, compiled anew in every process."""
    import numba

    from bitskip_cpu.kernels import numba_inside

    if not numba_inside.plain:
        print(
            f"Numba {numba.__version__} with llvmlite {llvmlite.__version__} is not the Numba that "
            f"bitskip knows ({type(error).__name__}): kernels are compiled by its plain njit in "
            "every process, which takes minutes; the results are the same",
            file=sys.stderr,
        )
        numba_inside.plain = True
        for module in [m for m in sys.modules if m.startswith("bitskip_cpu.kernels.")]:
            if module != numba_inside.__name__:
                del sys.modules[module]  # kernels are declared anew
    from bitskip_cpu.kernels.object_code import FUNCTIONS

    function = numba.njit(error_model="numpy", nogil=True)(FUNCTIONS[name])
    function.compile((numba.types.int64,) * ARGUMENTS[name])
    return function  # type: ignore[no-any-return]


KERNELS = Kernels()


def warmup(progress: Progress | None = None) -> None:
    """Compile the kernels, or load them from the cache; once per process."""
    for name in CALLED:
        KERNELS.function(name, progress)
