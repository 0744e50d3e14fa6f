"""A model on ONNX Runtime, as an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bitskip_export.onnx_builder import lay_out
from bitskip_export.onnx_files import find_graphs, weight_bytes
from bitskip_export.onnx_graph import ExitGraph, cache_name
from bitskip_ref.cache import ArrayCache, check_kv_cache
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine, Trace, Visit
from bitskip_ref.folder import CONFIG, read_folder
from bitskip_ref.rows import Run

DATA = "weights"  # name of the external file that is given in memory

OpenSession = Callable[[int, bool], ort.InferenceSession]
"""(exit layer, whether to trace) -> session."""


class OnnxCache(ArrayCache):
    """Keys and values as a graph takes and gives them."""


class OnnxModel(Engine):
    """The engine with one session for each exit, opened when first used.

    A graph runs a fixed number of blocks, from token ids to logits: rules that decide on the way,
    and drafts from another exit, are refused.
    """

    cache_type = OnnxCache

    def __init__(
        self,
        config: ModelConfig,
        open_session: OpenSession,
        kv_cache: str = "float32",
        threads: int = 0,
    ) -> None:
        super().__init__(config, kv_cache)
        self.threads = threads
        self._open = open_session
        self._sessions: dict[tuple[int, bool], ort.InferenceSession] = {}

    def session(self, exit_layer: int, trace: bool = False) -> ort.InferenceSession:
        """The session of an exit; kept from then on."""
        key = (exit_layer, trace)
        if key not in self._sessions:
            self._sessions[key] = self._open(exit_layer, trace)
        return self._sessions[key]

    def _extend(self, run: Run, n: int, first: int, trace: Trace | None) -> np.ndarray:
        session, cache = self.session(n, trace is not None), run.cache
        feeds = {"token_ids": np.array(run.ids, np.int64)}
        for i in range(n):
            for array, blocks in cache.arrays.items():
                feeds[cache_name("past", i, array)] = blocks[i][: run.first]
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        for i in range(n):
            for array, blocks in cache.arrays.items():
                blocks[i] = outputs.pop(cache_name("present", i, array))
        for name, values in outputs.items():
            if name.startswith("exit") or name == "logits":
                outputs[name] = values[first:]
        logits: np.ndarray = outputs.pop("logits")
        if trace is not None:
            for stage, values in outputs.items():
                trace(stage, values)
            trace("logits", logits)
        return logits

    def _extend_exits(self, run: Run, exits: Sequence[int], visit: Visit) -> None:
        """Each exit has its own graph, which starts from the tokens."""
        for n in exits:
            visit(n, 0, self._extend(run, n, 0, None))

    def _own(self, cache: Any) -> None:
        super()._own(cache)
        if cache.kv_cache != self.kv_cache:
            raise ValueError(
                f"the cache holds {cache.kv_cache}, this engine's graphs take {self.kv_cache}: "
                "take one from new_cache()"
            )

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "an ONNX graph runs a fixed number of blocks, from token ids: choose an exit layer by "
            "number, or another engine for exits by gate or confidence and for speculation"
        )

    _embed = _blocks = _fill = _exit = _gate = _confidence = _join = _refuse


def load_onnx(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    optimization: int = 99,
    kv_cache: str | None = None,
) -> OnnxModel:
    """Load a model folder (graphs are built in memory), an .onnx file or a folder of them.

    threads: 0 leaves the number to ONNX Runtime. optimization: a GraphOptimizationLevel; it does
    not change a bit. kv_cache: one of KV_CACHES (SPEC 6.5, 6.8); None: float32, or what the files
    were written for. Raises FormatError for what is neither, ValueError for files of another cache.
    """

    def options() -> ort.SessionOptions:
        made = ort.SessionOptions()
        made.intra_op_num_threads = threads
        made.graph_optimization_level = ort.GraphOptimizationLevel(optimization)
        return made

    root = Path(path)
    if (root / CONFIG).is_file():
        folder = read_folder(root)
        kind = check_kv_cache(kv_cache or "float32", folder.config)

        def build(exit_layer: int, trace: bool) -> ort.InferenceSession:
            graph = ExitGraph(folder.config, folder.tensors, exit_layer, trace, kind)
            offsets, size = lay_out(graph.g.weights)
            data = b"".join(weight_bytes(graph.g.weights))
            chosen = options()
            chosen.add_external_initializers_from_files_in_memory([DATA], [data], [size])
            model = graph.model((DATA, offsets)).SerializeToString()
            return ort.InferenceSession(model, chosen)

        return OnnxModel(folder.config, build, kind, threads)

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

    return OnnxModel(config, read, kind, threads)
