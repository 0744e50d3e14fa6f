"""Running ternary models with early exit on CPUs.

Importing this package is cheap; Numba is imported when an engine is made.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitskip_cpu.engine import Engine

__all__ = ["load"]


def load(path: str | os.PathLike[str], threads: int | None = None) -> Engine:
    """Load a model folder (docs/FORMAT.md) to run on `threads` threads (None: physical cores).

    Raises bitskip_ref.folder.FormatError for a folder that is not whole.
    """
    from bitskip_cpu import engine

    return engine.load(path, threads)
