"""A model on ONNX Runtime, as a `bitskip_ref.engine.Engine`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bitskip_export.onnx_builder import lay_out
from bitskip_export.onnx_files import find_graphs, weight_bytes
from bitskip_export.onnx_graph import ExitGraph
from bitskip_ref.cache import CacheFill, check_kv_cache
from bitskip_ref.checks import check_exit_layer, check_exit_layers, check_input
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import ExitRule, Trace, Visit
from bitskip_ref.folder import CONFIG, read_folder

DATA = "weights"  # name of the external file that is given in memory

OpenSession = Callable[[int, bool], ort.InferenceSession]
"""(exit layer, whether to trace) -> session."""


class OnnxCache(CacheFill):
    """Keys (turned) and values of each block, f32 or f16 [S, K, E] (SPEC 6.4, 6.5)."""

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        super().__init__(config, kv_cache)
        empty = np.zeros((0, config.num_key_value_heads, config.head_dim), kv_cache)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers


class OnnxModel:
    """`bitskip_ref.engine.Engine` with one session for each exit, opened when first used."""

    def __init__(
        self, config: ModelConfig, open_session: OpenSession, kv_cache: str = "float32"
    ) -> None:
        self.config, self.kv_cache = config, kv_cache
        self._open = open_session
        self._sessions: dict[tuple[int, bool], ort.InferenceSession] = {}

    def session(self, exit_layer: int, trace: bool = False) -> ort.InferenceSession:
        """The session of an exit; kept from then on."""
        key = (exit_layer, trace)
        if key not in self._sessions:
            self._sessions[key] = self._open(exit_layer, trace)
        return self._sessions[key]

    def new_cache(self) -> OnnxCache:
        return OnnxCache(self.config, self.kv_cache)

    def extend(
        self,
        token_ids: Sequence[int],
        cache: OnnxCache,
        *,
        exit_layer: int | None = None,
        last_only: bool = False,
        trace: Trace | None = None,
    ) -> np.ndarray:
        n = check_exit_layer(exit_layer, self.config)
        ids = check_input(token_ids, cache, n, self.config)
        session = self.session(n, trace is not None)
        feeds = {"token_ids": ids}
        for i in range(n):
            feeds[f"past.{i}.key"] = cache.keys[i][: cache.length]
            feeds[f"past.{i}.value"] = cache.values[i][: cache.length]
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        for i in range(n):
            cache.keys[i] = outputs.pop(f"present.{i}.key")
            cache.values[i] = outputs.pop(f"present.{i}.value")
        cache.advance(len(ids), n)
        if last_only:
            for name in ("exit_norm", "logits"):
                if name in outputs:
                    outputs[name] = outputs[name][-1:]
        logits = outputs.pop("logits")
        if trace:
            for stage, values in outputs.items():
                trace(stage, values)
            trace("logits", logits)
        return logits

    def extend_exits(
        self, token_ids: Sequence[int], cache: OnnxCache, exit_layers: Sequence[int], visit: Visit
    ) -> None:
        """As the protocol has it; each exit has its own graph, which starts from the tokens."""
        exits, length = check_exit_layers(exit_layers, self.config), cache.length
        check_input(token_ids, cache, exits[-1], self.config)
        for n in exits:
            cache.length = length
            visit(n, 0, self.extend(token_ids, cache, exit_layer=n))

    def step(
        self, token_id: int, cache: OnnxCache, rule: ExitRule, trace: Trace | None = None
    ) -> tuple[np.ndarray, int]:
        n = rule.deepest(self.config)
        if rule.looks(self.config):
            raise ValueError(
                "an ONNX graph runs a fixed number of blocks: choose an exit layer, or another "
                "engine for exits by gate or confidence"
            )
        return self.extend([token_id], cache, exit_layer=n, trace=trace)[0], n

    def speculate(self, *arguments: object, **options: object) -> tuple[list[int], np.ndarray]:
        """Refused: a graph starts from token ids, not from the hidden states of another."""
        raise ValueError(
            "an ONNX graph cannot go on where another exit's stopped: speculate on another engine"
        )

    def logits(self, token_ids: Sequence[int], exit_layer: int | None = None) -> np.ndarray:
        return self.extend(token_ids, self.new_cache(), exit_layer=exit_layer)


def load_onnx(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    optimization: int = 99,
    kv_cache: str | None = None,
) -> OnnxModel:
    """Load a model folder (graphs are built in memory), an .onnx file or a folder of them.

    threads: 0 leaves the number to ONNX Runtime. optimization: a GraphOptimizationLevel; it does
    not change a bit. kv_cache: float32 or float16 (SPEC 6.5); None: float32, or what the files were
    written for. Raises FormatError for what is neither, ValueError for files of another cache.
    """

    def options() -> ort.SessionOptions:
        made = ort.SessionOptions()
        made.intra_op_num_threads = threads
        made.graph_optimization_level = ort.GraphOptimizationLevel(optimization)
        return made

    root = Path(path)
    if (root / CONFIG).is_file():
        folder, kind = read_folder(root), check_kv_cache(kv_cache or "float32")

        def build(exit_layer: int, trace: bool) -> ort.InferenceSession:
            graph = ExitGraph(folder.config, folder.tensors, exit_layer, trace, kind)
            offsets, size = lay_out(graph.g.weights)
            data = b"".join(weight_bytes(graph.g.weights))
            chosen = options()
            chosen.add_external_initializers_from_files_in_memory([DATA], [data], [size])
            model = graph.model((DATA, offsets)).SerializeToString()
            return ort.InferenceSession(model, chosen)

        return OnnxModel(folder.config, build, kind)

    config, kind, graphs = find_graphs(root)
    if kv_cache not in (None, kind):
        raise ValueError(
            f"{root} was written for a {kind} KV cache: export with --kv-cache {kv_cache}"
        )

    def read(exit_layer: int, trace: bool) -> ort.InferenceSession:
        if trace:
            raise ValueError("graphs in .onnx files have no stages to trace: load a model folder")
        if exit_layer not in graphs:
            raise ValueError(
                f"{root} has no graph of exit {exit_layer}, only of {sorted(graphs)}: "
                f"export with --exit-layer {exit_layer}"
            )
        return ort.InferenceSession(graphs[exit_layer], options())

    return OnnxModel(config, read, kind)
