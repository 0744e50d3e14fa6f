"""Compiling the kernels once per machine: where the result is kept, and whether it is there.

The folder's name hashes every kernel source, the versions of Numba and llvmlite, the CPU and the
path. What is in it is loaded without Numba (`native`), which is imported only to compile.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from bitskip_cpu import isa, native
from bitskip_ref import constants
from bitskip_ref.files import replace_file

Progress = Callable[[int], None]
"""Called with the number of functions compiled so far."""

ARGUMENTS = {"run": 5, "repack": 7}
"""The kernels that Python calls (`kernels.object_code`), each with the number of its arguments."""

DIGEST = 32  # bytes of the checksum before the code


def user_cache() -> Path:
    """Where things that can be made anew are kept: BITSKIP_CACHE_DIR or the user's cache folder."""
    root = os.environ.get("BITSKIP_CACHE_DIR")
    if not root:
        import platformdirs

        root = platformdirs.user_cache_dir("bitskip")
    return Path(root)


def cache_folder() -> Path:
    """Where compiled kernels belong."""
    return user_cache() / f"kernels-{_fingerprint()}"


def cache_directory() -> Path | None:
    """`cache_folder`, made if need be; None if it cannot be written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _fingerprint() -> str:
    words = [llvmlite.__version__, np.__version__, llvm.get_process_triple()]
    words += [repr(isa.PATH), isa.cpu_name(), *sorted(isa.cpu_features())]
    digest = hashlib.sha256("\n".join(words).encode())
    found = find_spec("numba")
    if found and found.origin:  # its version, without the time to import it
        digest.update((Path(found.origin).parent / "_version.py").read_bytes())
    shaping = Path(__file__).parent.rglob("kernels/**/*.py"), [Path(constants.__file__)]
    for source in sorted(chain(*shaping)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


class Kernels:
    """The compiled functions. Nothing is compiled or loaded before it is needed."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., None]] = {}

    @cached_property
    def _folder(self) -> Path:
        return cache_folder()

    @cached_property
    def directory(self) -> Path | None:
        """Where compiled kernels are kept; None: nowhere, they are compiled in every process."""
        return None if isa.INTERPRETED else cache_directory()

    @property
    def compiled(self) -> bool:
        """Whether everything can start without compiling (always, if interpreted)."""
        if isa.INTERPRETED or self._functions.keys() == ARGUMENTS.keys():
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
        """One of ARGUMENTS, loaded, and compiled before if need be."""
        if name not in self._functions:
            if isa.INTERPRETED:
                from bitskip_cpu.kernels.object_code import FUNCTIONS

                self._functions[name] = FUNCTIONS[name]
            else:
                code = self._stored(name) or self._made(name, progress or (lambda _: None))
                self._functions[name] = native.load(code, name, ARGUMENTS[name])
        return self._functions[name]

    def _stored(self, name: str) -> bytes | None:
        """The object file in the cache, if it is there and whole."""
        try:
            content = (self._folder / name).read_bytes()
        except OSError:
            return None
        code = content[DIGEST:]
        return code if code and hashlib.sha256(code).digest() == content[:DIGEST] else None

    def _made(self, name: str, progress: Progress) -> bytes:
        """The object file, compiled, and kept if there is a place for it."""
        from bitskip_cpu.kernels.object_code import machine_code

        code = machine_code(name, ARGUMENTS[name], progress)
        if self.directory:
            with replace_file(self.directory / name) as file:
                file.write(hashlib.sha256(code).digest() + code)
        return code


KERNELS = Kernels()


def warmup(progress: Progress | None = None) -> None:
    """Compile the kernels, or load them from the cache; once per process."""
    for name in ARGUMENTS:
        KERNELS.function(name, progress)
