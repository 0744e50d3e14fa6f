"""Which files of ours shape the kernels' code, and a hash of them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from bitskip_cpu import isa

ROOT = Path(__file__).parent.parent
IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(bitskip_[\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(bitskip_[\w.]+))",
    re.MULTILINE,
)


def digest() -> str:
    """A hash of the path's record and of `sources`; neither of the CPU nor of what compiles."""
    found = hashlib.sha256(repr(isa.PATH).encode())
    for source in sources():
        found.update(source.read_bytes())
    return found.hexdigest()


def sources() -> list[Path]:
    """The files of ours that shape the code: those that `kernels.object_code` needs, in order.

    What its imports name, and theirs; not the packages' `__init__`, unless something is imported
    from them.
    """
    found: set[Path] = set()
    waiting = [
        _file_of(f"bitskip_cpu.kernels.{name}")
        for name in (
            "object_code",
            f"products.{isa.PATH.kernels}",  # the latter by name alone
        )
    ]
    while waiting:
        path = waiting.pop()
        if path is None or path in found:
            continue
        found.add(path)
        for module, names, plain in IMPORT.findall(path.read_text("utf-8")):
            inside = [_file_of(f"{module}.{name}") for name in re.findall(r"\w+", names)]
            waiting += inside
            if plain or not all(inside):
                waiting.append(_file_of(module or plain))
    return sorted(found)


def _file_of(module: str) -> Path | None:
    """A module's source; None for a name inside a module, and for packages that hold no code."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None
