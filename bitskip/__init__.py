"""bitskip: ternary early-exit language models, trained, exported and run with the same bits.

`load` opens a model; the program is `bitskip VERB`. Importing this package loads nothing heavy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` would be most of the time until Ctrl-C is heard (`bitskip.early`)
if TYPE_CHECKING:
    from typing import Any

    from bitskip_cpu import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"  # the one place: pyproject.toml reads it here


def __getattr__(name: str) -> Any:
    if name == "load":
        from bitskip_cpu import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
