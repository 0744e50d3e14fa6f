"""PyTorch: the model with straight-through gradients, and its training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitskip_train.loaded import load_exported

__all__ = ["load_exported"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: reading a preset's name must not cost an import of torch.
    if name == "load_exported":
        from bitskip_train.loaded import load_exported

        return load_exported
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
