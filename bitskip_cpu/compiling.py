"""Compiling the kernels once per machine: where the result is kept, and whether it is there.

Numba's own cache does not notice an edit in a function that the cached one calls. The folder's name
therefore hashes every kernel source, the versions of Numba and llvmlite, the CPU and the path.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import platformdirs
from numba import config, types
from numba.core import event

from bitskip_cpu import isa
from bitskip_cpu.kernels.layout import PRODUCT, STATE

Progress = Callable[[int], None]
"""Called with the number of functions compiled so far."""


def cache_directory() -> Path | None:
    """BITSKIP_CACHE_DIR or the user's cache, made if need be; None if it cannot be written."""
    root = os.environ.get("BITSKIP_CACHE_DIR") or platformdirs.user_cache_dir("bitskip")
    folder = Path(root) / f"kernels-{_fingerprint()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _fingerprint() -> str:
    digest = hashlib.sha256()
    words = [numba.__version__, llvmlite.__version__, np.__version__, isa.PATH, isa.cpu_name()]
    digest.update("\n".join([*words, *sorted(isa.cpu_features())]).encode())
    for source in sorted(Path(__file__).parent.glob("kernels/*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


class Kernels:
    """The compiled functions. Nothing is compiled or loaded before it is needed."""

    @cached_property
    def directory(self) -> Path | None:
        """Where compiled kernels are kept; None: nowhere, they are compiled in every process."""
        return None if config.DISABLE_JIT else cache_directory()

    @property
    def compiled(self) -> bool:
        """Whether everything can start without compiling (always, if interpreted)."""
        if config.DISABLE_JIT or {"run", "repack"} <= self.__dict__.keys():
            return True
        if self.directory is None:
            return False
        # Another checkout with the same sources keeps its own under the same folder.
        return all(any(self.directory.rglob(f"*.{name}-*.nbi")) for name in ("run", "repack"))

    @cached_property
    def run(self) -> Callable[..., None]:
        """`kernels.forward`'s function, compiled; see there for its arguments."""
        from bitskip_cpu.kernels.forward import run

        state, product = (types.Array(numba.from_dtype(kind), 1, "C") for kind in (STATE, PRODUCT))
        return self._compile(run, state, product, *[types.int64] * 3)

    @cached_property
    def repack(self) -> Callable[..., None]:
        """`kernels.repack`'s function, compiled; see there for its arguments."""
        from bitskip_cpu.kernels.repack import repack

        return self._compile(repack, *[types.int64] * 7)

    def _compile(self, function: Callable[..., None], *signature: types.Type) -> Any:
        if config.DISABLE_JIT:
            return function
        before = config.CACHE_DIR
        try:
            # Read when the dispatcher is made; others' functions keep their own place.
            config.CACHE_DIR = str(self.directory or "")
            dispatcher = numba.njit(
                nogil=True, error_model="numpy", cache=self.directory is not None
            )(function)
        finally:
            config.CACHE_DIR = before
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher


KERNELS = Kernels()


def warmup(progress: Progress | None = None) -> None:
    """Compile the kernels, or load them from the cache; once per process."""
    if config.DISABLE_JIT:
        return
    with event.install_listener("numba:compile", _Counter(progress or (lambda _: None))):
        KERNELS.run, KERNELS.repack  # noqa: B018


class _Counter(event.Listener):
    def __init__(self, progress: Progress) -> None:
        self.progress, self.done = progress, 0

    def on_start(self, event: Any) -> None:
        pass

    def on_end(self, event: Any) -> None:
        self.done += 1
        self.progress(self.done)
