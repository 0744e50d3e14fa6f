"""Which files of ours shape the kernels' code, and a hash of them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from bitskip_cpu import isa

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(bitskip_[\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(bitskip_[\w.]+))",
    re.MULTILINE,
)


def digest(path: isa.Path | None = None) -> str:
    """A hash of the path's record and of `sources`; neither of the CPU nor of what compiles.

    path: this process's, or that path as another kind of CPU wants it (`isa.tuned`).
    """
    found = hashlib.sha256(repr(path or isa.PATH).encode())
    for _, content in _sources():
        found.update(content)
    return found.hexdigest()


def sources() -> list[Path]:
    """The files of ours that shape the code: those that `kernels.object_code` needs, in order.

    What its imports name, and theirs; not the packages' `__init__`, unless something is imported
    from them.
    """
    return [Path(file) for file, _ in _sources()]


def _sources() -> list[tuple[str, bytes]]:
    """`sources`, with what is in them. Every start asks: strings take a third of Paths' time."""
    found: dict[str, bytes] = {}
    waiting = [
        _file_of(f"bitskip_cpu.kernels.{name}")
        for name in (
            "object_code",
            f"products.{isa.PATH.kernels}",  # the latter by name alone
        )
    ]
    while waiting:
        file = waiting.pop()
        if file is None or file in found:
            continue
        with open(file, "rb") as source:
            found[file] = source.read()
        for module, names, plain in IMPORT.findall(found[file].decode()):
            whole = _file_of(module or plain)
            inside: list[str | None] = []
            if whole is None or os.path.basename(whole) == "__init__.py":
                inside = [_file_of(f"{module}.{name}") for name in re.findall(r"\w+", names)]
            waiting += inside
            if not inside or not all(inside):
                waiting.append(whole)
    return sorted(found.items())


def _file_of(module: str) -> str | None:
    """A module's source; None for a name inside a module, and for packages that hold no code."""
    path = os.path.join(ROOT, *module.split("."))
    for file in (f"{path}.py", os.path.join(path, "__init__.py")):
        if os.path.isfile(file):
            return file
    return None
