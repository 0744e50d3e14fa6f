"""Checkpoint to packed folder, and packed folder to ONNX; `load_onnx` runs the latter."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitskip_export.onnx_engine import OnnxModel


def load_onnx(path: str | os.PathLike[str], **options: Any) -> OnnxModel:
    """An engine on ONNX Runtime: see `bitskip_export.onnx_engine` (imported when called)."""
    from bitskip_export.onnx_engine import load_onnx as load

    return load(path, **options)
