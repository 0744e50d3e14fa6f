"""Every engine on the same tensors, for tests of what they all promise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import bitskip_cpu.engine
from bitskip_ref.config import ModelConfig
from bitskip_ref.folder import write_folder
from bitskip_ref.model import ReferenceModel

ENGINES = ("reference", "numba", "torch", "onnx")


def make(
    name: str,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    kv_cache: str = "float32",
    threads: int = 1,
) -> Any:
    """The engine of that name, or a skipped test where its library is missing."""
    if name == "reference":
        return ReferenceModel(config, tensors, kv_cache)
    if name == "numba":
        return bitskip_cpu.engine.Engine(config, tensors, threads, kv_cache)
    if name == "torch":
        return pytest.importorskip("bitskip_train.loaded").TorchEngine(config, tensors, kv_cache)
    onnx = pytest.importorskip("bitskip_export.onnx_engine")
    with tempfile.TemporaryDirectory() as folder:  # it stays mapped
        write_folder(folder, config, tensors)
        return onnx.load_onnx(folder, threads=threads, kv_cache=kv_cache)
