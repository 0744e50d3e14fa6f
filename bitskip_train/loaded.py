"""An exported model folder as an exact engine in PyTorch (`bitskip_ref.engine.Engine`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitskip_ref.cache import check_kv_cache
from bitskip_ref.checks import check_exit_layer, check_exit_layers, check_input
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.draft import Choose, Draft
from bitskip_ref.engine import ExitRule, Trace, Visit
from bitskip_ref.folder import read_folder
from bitskip_ref.packing import unpack_ternary
from bitskip_train.exact import confidence
from bitskip_train.layers import Cache, TensorTrace
from bitskip_train.model import BitskipModel


def load_exported(path: str | os.PathLike[str], kv_cache: str = "float32") -> TorchEngine:
    """Load a model folder. Raises `bitskip_ref.FormatError` if it is not a whole one."""
    folder = read_folder(path)
    return TorchEngine(folder.config, folder.tensors, kv_cache)


class TorchEngine:
    """`bitskip_ref.engine.Engine` over `BitskipModel` in exact arithmetic, on CPU."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], kv_cache: str = "float32"
    ) -> None:
        """`tensors` as in a model folder (FORMAT 3); codes stay int8 until they are multiplied.

        kv_cache: what new caches hold, float32 or float16 (SPEC 6.5).
        """
        self.config, self.kv_cache = config, check_kv_cache(kv_cache)
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
            setattr(owner, leaf, tensor if leaf == "scale" else nn.Parameter(tensor, False))

    def new_cache(self) -> Cache:
        return Cache(self.config, kv_cache=self.kv_cache)

    def logits(self, token_ids: Sequence[int], exit_layer: int | None = None) -> np.ndarray:
        return self.extend(token_ids, self.new_cache(), exit_layer=exit_layer)

    def extend(
        self,
        token_ids: Sequence[int],
        cache: Cache,
        *,
        exit_layer: int | None = None,
        last_only: bool = False,
        trace: Trace | None = None,
    ) -> np.ndarray:
        n = check_exit_layer(exit_layer, self.config)
        ids = self._ids(token_ids, cache, n)
        report = _without_batch(trace)
        x = self.model(ids, exit_layer=n, cache=cache, trace=report)[n]
        return self.model.logits(x[:, -1:] if last_only else x, n, report)[0].numpy()

    def extend_exits(
        self, token_ids: Sequence[int], cache: Cache, exit_layers: Sequence[int], visit: Visit
    ) -> None:
        exits = check_exit_layers(exit_layers, self.config)
        ids = self._ids(token_ids, cache, exits[-1])
        hidden = self.model(ids, exit_layer=exits[-1], collect=exits, cache=cache)
        for n in exits:
            visit(n, 0, self.model.logits(hidden[n], n)[0].numpy())

    def step(
        self, token_id: int, cache: Cache, rule: ExitRule, trace: Trace | None = None
    ) -> tuple[np.ndarray, int]:
        model, deepest = self.model, rule.deepest(self.config)
        report, ops = _without_batch(trace), model.ops()
        ids = self._ids([token_id], cache, deepest)
        with model.region(ops):
            run = model.start(ops, "none", cache.length, 1)
            x = model.embed(ids, ops)
            if report is not None:
                report("embed", x)
            n = 0
            for look in (*rule.looks(self.config), deepest):
                for i in range(n, look):
                    x = model.run_block(i, x, run, cache=cache, trace=report)
                n = look
                if n < deepest and rule.stops(TorchProbe(model, x, n)):
                    break
            for i in range(n, deepest):  # SPEC 8.6
                block = model.block(i)
                _, keys, values = block.queries_keys_values(x, run)
                cache.write(i, keys, values)
        cache.advance(1, deepest)
        return model.logits(x, n, report)[0, 0].numpy(), n

    def speculate(
        self,
        token_id: int,
        cache: Cache,
        count: int,
        draft: Draft,
        *,
        exit_layer: int | None = None,
        choose: Choose | None = None,
    ) -> tuple[list[int], np.ndarray]:
        model, low, start = self.model, draft.exit_layer, cache.length
        n = draft.check_round(token_id, cache, count, exit_layer, self.config)
        hidden: list[Tensor] = []

        def run(token: int, logits: bool) -> np.ndarray | None:
            hidden.append(model(torch.tensor([[token]]), exit_layer=low, cache=cache)[low])
            return model.logits(hidden[-1], low)[0, 0].numpy() if logits else None

        try:
            ids = draft.ids(token_id, count, choose, run)
        finally:
            cache.length = start  # the blocks above go on from there
        ops = model.ops()
        with model.region(ops):
            above, x = model.start(ops, "none", start, len(ids)), torch.cat(hidden, 1)
            for i in range(low, n):
                x = model.run_block(i, x, above, cache=cache)
        cache.advance(len(ids), n)
        return ids[1:], model.logits(x, n)[0].numpy()

    def _ids(self, token_ids: Sequence[int], cache: Cache, blocks: int) -> Tensor:
        return torch.from_numpy(check_input(token_ids, cache, blocks, self.config))[None]


class TorchProbe:
    """`bitskip_ref.engine.Probe` of one token after n blocks (SPEC 8.4, 8.5)."""

    def __init__(self, model: BitskipModel, hidden: Tensor, n: int) -> None:
        self.model, self.hidden, self.n = model, hidden, n

    def gate(self) -> np.float32:
        return np.float32(self.model.gate(self.hidden, self.n).item())

    def confidence(self, measure: str) -> np.float32:
        return np.float32(confidence(self.model.logits(self.hidden, self.n)[0, 0], measure).item())


def _without_batch(trace: Trace | None) -> TensorTrace | None:
    """The NumPy trace as one for tensors with a leading batch axis of 1."""
    if trace is None:
        return None
    return lambda stage, values: trace(stage, values[0].numpy())
