"""Ternary early-exit models on the CPU: `load` a folder, then `generate` or use token ids.

Importing this package loads nothing heavy; `load` brings in NumPy and Numba.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` would be most of the time until Ctrl-C is heard (`bitskip.early`)
if TYPE_CHECKING:
    import os

    from bitskip_cpu.model import Model

__all__ = ["load"]


def load(
    model: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    kv_cache: str | None = None,
    usual_cache: str = "float32",
) -> Model:
    """Load a model folder, or a model that comes with the package (None: the default one).

    threads: None takes what suits the machine. kv_cache: float32; float16 or int8 round keys and
    values, to half and about a quarter of the memory (SPEC 6.5, 6.8); None: what the folder
    recommends, else `usual_cache` (float16 where that is int8 and cannot be). Raises
    bitskip_ref.FormatError if the folder is not a whole model, ValueError if there is none or an
    argument is out of range.
    """
    from bitskip_cpu import models

    return models.opened(model, kv_cache, usual_cache).model(threads)
