"""Compiling in a second process beside this one: Numba holds the interpreter's lock."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from bitskip_cpu.cores import usable_cores

CODE = """
import json, sys
sys.path[:], *rest = map(json.loads, sys.argv[1:])
from bitskip_cpu.compiling import compile_beside
compile_beside(*rest)
"""


def possible() -> bool:
    """Whether a second process would help: two cores, and a Python that can be started again."""
    name = Path(sys.executable or "").name.lower()
    return usable_cores() > 1 and name.startswith("python") and not getattr(sys, "frozen", False)


def claim(folder: str, name: str) -> bool:
    """Whether a piece is for the process that asks: the first of the two that does."""
    try:
        (Path(folder) / f"{name}.begun").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Beside:
    """A second process that compiles pieces, from the last on, while the `with` statement lasts.

    It may fail; where it would not help, or there is one piece only, there is none.
    """

    def __init__(
        self, names: Sequence[str], cache: str, progress: Callable[[str, float], None]
    ) -> None:
        """`cache`: the name that the cache folder must have there, too, as it hashes all that
        shapes the code. `progress` is told a piece and how much of it is done, by a thread."""
        self._process: subprocess.Popen[str] | None = None
        if len(names) < 2 or not possible():
            return
        self._folder = tempfile.TemporaryDirectory(prefix="bitskip-")
        words = [json.dumps(w) for w in (sys.path, list(names), cache, self._folder.name)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE, *words], text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._reader = Thread(target=self._read, args=(progress,), daemon=True)
        self._reader.start()

    def _read(self, progress: Callable[[str, float], None]) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            name, share = line.split()
            progress(name, float(share))

    def mine(self, name: str) -> bool:
        """Whether this process is to make a piece: the other has not begun it."""
        return self._process is None or claim(self._folder.name, name)

    def code(self, name: str) -> bytes | None:
        """A piece's object file, waited for; None if the process could not make it."""
        self._reader.join()  # it ends with the process
        try:
            return (Path(self._folder.name) / name).read_bytes()
        except OSError:
            return None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._folder.cleanup()
