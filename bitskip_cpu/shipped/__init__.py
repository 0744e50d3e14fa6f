"""Object code that came with the package, for the usual CPUs: with it nothing is compiled.

`python -m bitskip_cpu.shipped.make` writes it before a wheel is built. It belongs to our sources
and to a set of CPU features; which Numba and LLVM are installed does not matter to it, as neither
takes part in running it. A clone has none, and compiles.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path

from bitskip_cpu import isa, sources

FOLDER = Path(__file__).parent
MANIFEST = "manifest.json"
"""Set (`set_name`) -> its features, the sources' hash, what made it, its files' hashes."""


def set_name(machine: str, path: isa.Path) -> str:
    """The name of a path's object code for Linux on a machine, as `platform.machine` says it."""
    return "-".join(filter(None, ("linux", machine, path.name, path.fetch.name)))


def code(name: str) -> bytes | None:
    """A kernel's object file for this process; None if there is none, or not a whole one.

    It must have been made of these very sources, for features that the CPU has. Where a path has
    no set for this kind of CPU, the path's own is taken, which asks for memory otherwise.
    """
    if not sys.platform.startswith("linux"):
        return None
    paths = dict.fromkeys((isa.PATH, isa.tuned(isa.PATH, "")))  # the same on most CPUs
    found = (_code(path, name) for path in paths)
    return next((content for content in found if content is not None), None)


def _code(path: isa.Path, name: str) -> bytes | None:
    wanted = set_name(platform.machine(), path)
    try:
        found = json.loads((FOLDER / MANIFEST).read_bytes())[wanted]
        if not isa.cpu_features().issuperset(found["features"]):
            return None
        content = (FOLDER / f"{wanted}-{name}.o").read_bytes()
        whole = hashlib.sha256(content).hexdigest() == found["files"][name]
        return content if whole and found["sources"] == sources.digest(path) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
