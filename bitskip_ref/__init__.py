"""The executable definition of bitskip models in NumPy: slow, plain, exact (docs/SPEC.md)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitskip_ref.config import ConfigError, ModelConfig, preset
    from bitskip_ref.model import ReferenceModel, load
    from bitskip_ref.tensors import FormatError

__all__ = ["ConfigError", "FormatError", "ModelConfig", "ReferenceModel", "load", "preset"]

_HOMES = {
    "ConfigError": "config", "ModelConfig": "config", "preset": "config",
    "FormatError": "tensors", "ReferenceModel": "model", "load": "model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded on first use: a command line that asks for presets must not wait for NumPy.
    if name in _HOMES:
        return getattr(importlib.import_module(f"bitskip_ref.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
