"""An exported model folder as an exact engine in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine, Trace
from bitskip_ref.floats import BFLOAT16, widened
from bitskip_ref.folder import read_folder
from bitskip_ref.packing import unpack_ternary
from bitskip_ref.rows import Run
from bitskip_ref.tensors import linear_layers
from bitskip_train.exact import confidence
from bitskip_train.layers import Cache, TensorTrace
from bitskip_train.model import BitskipModel


def load_exported(path: str | os.PathLike[str], kv_cache: str = "float32") -> TorchEngine:
    """Load a model folder. Raises `bitskip_ref.FormatError` if it is not a whole one."""
    folder = read_folder(path)
    return TorchEngine(folder.config, folder.tensors, kv_cache)


def parameter_values(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], name: str
) -> np.ndarray:
    """The numbers that a folder's tensors (FORMAT 3) stand for, of a parameter of some name: a new
    f32 array (SPEC 4.1, 4.4, 4.5, 4.8)."""
    values, owner = tensors[name], name.removesuffix(".weight")
    if values.dtype == np.uint8:
        values = unpack_ternary(values, linear_layers(config)[owner][1])
    numbers, scale = widened(values), tensors.get(f"{owner}.scale")
    return numbers if scale is None else numbers * scale[:, None]


class TorchEngine(Engine):
    """The engine over `BitskipModel` in exact arithmetic, on CPU."""

    cache_type = Cache

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], kv_cache: str = "float32"
    ) -> None:
        """`tensors` as in a model folder (FORMAT 3); codes stay int8 until they are multiplied.

        kv_cache: what new caches hold, one of KV_CACHES (SPEC 6.5, 6.8).
        """
        super().__init__(config, kv_cache)
        with torch.device("meta"):  # shapes only: the random weights are not wanted
            self.model = BitskipModel(config)
        self.model.arithmetic = "exact"
        for name, values in tensors.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(owner_name)
            if values.dtype == np.uint8:
                width = config.linear_shapes()[owner_name.rpartition(".")[2]][1]
                values = unpack_ternary(values, width)
            tensor = torch.from_numpy(np.array(values))
            tensor = tensor.view(torch.bfloat16) if values.dtype == BFLOAT16 else tensor
            setattr(owner, leaf, tensor if leaf == "scale" else nn.Parameter(tensor, False))

    @property
    def threads(self) -> int:  # type: ignore[override]
        """PyTorch's, which all models of the process share."""
        return torch.get_num_threads()

    # ---- primitives: hidden states are tensors [1, T, D] --------------------------------

    def _embed(self, run: Run, trace: Trace | None = None) -> Tensor:
        ops = self.model.ops()
        with self.model.region(ops):
            x = self.model.embed(torch.as_tensor(run.ids)[None], ops)
        if trace is not None:
            trace("embed", x[0].numpy())
        return x

    def _blocks(
        self, x: Tensor, run: Run, first: int, last: int, trace: Trace | None = None
    ) -> Tensor:
        ops, report = self.model.ops(), _without_batch(trace)
        with self.model.region(ops):
            at = self.model.start(ops, "none", run.first, x.shape[1])
            for i in range(first, last):
                x = self.model.run_block(i, x, at, cache=run.cache, trace=report)
        return x

    def _fill(self, x: Tensor, run: Run, first: int, last: int) -> None:
        ops = self.model.ops()
        with self.model.region(ops):
            at = self.model.start(ops, "none", run.first, 1)
            for i in range(first, last):
                _, keys, values = self.model.block(i).queries_keys_values(x, at)
                run.cache.write(i, run.first, keys, values)

    def _exit(self, x: Tensor, n: int, first: int = 0, trace: Trace | None = None) -> np.ndarray:
        return self.model.logits(x[:, first:], n, _without_batch(trace))[0].numpy()

    def _gate(self, x: Tensor, n: int) -> np.float32:
        return np.float32(self.model.gate(x, n).item())

    def _confidence(self, z: np.ndarray, measure: str) -> np.float32:
        return np.float32(confidence(torch.from_numpy(z), measure).item())

    def _join(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(rows), 1)


def _without_batch(trace: Trace | None) -> TensorTrace | None:
    """The NumPy trace as one for tensors with a leading batch axis of 1."""
    if trace is None:
        return None
    return lambda stage, values: trace(stage, values[0].numpy())
