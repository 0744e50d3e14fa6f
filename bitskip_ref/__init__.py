"""The executable definition of bitskip models in NumPy: slow, plain, exact (docs/SPEC.md)."""

from bitskip_ref.config import ConfigError, ModelConfig, preset
from bitskip_ref.model import ReferenceModel, load
from bitskip_ref.tensors import FormatError

__all__ = ["ConfigError", "FormatError", "ModelConfig", "ReferenceModel", "load", "preset"]
