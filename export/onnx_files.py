"""ONNX files: one graph for each exit, and one file of weights that they share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import onnx

from bitskip_export.onnx_builder import Weight, lay_out
from bitskip_export.onnx_graph import CACHE_KEY, CONFIG_KEY, EXIT_KEY, ExitGraph
from bitskip_ref.cache import check_kv_cache
from bitskip_ref.checks import check_exit_layer
from bitskip_ref.config import ModelConfig
from bitskip_ref.excerpt import one_line
from bitskip_ref.files import replace_file
from bitskip_ref.folder import Folder, read_folder
from bitskip_ref.tensors import FormatError


def write_onnx(
    folder: str | os.PathLike[str] | Folder,
    out_dir: str | os.PathLike[str],
    exits: Sequence[int] | None = None,
    kv_cache: str = "float32",
    at_once: bool = False,
) -> list[Path]:
    """Write `exit-N.onnx` for each exit (None: the full depth) and the `weights-*.data` they need.

    The weights' file is named after its content, so that graphs written earlier keep theirs. Each
    file appears whole or not at all, the graphs last. kv_cache: kind of the cache, one of
    KV_CACHES (SPEC 6.5, 6.8). at_once: as of `ExitGraph`. Returns the paths of the graphs.
    Raises ValueError for an exit out of range.
    """
    model = folder if isinstance(folder, Folder) else read_folder(folder)
    shared: dict[str, Weight] = {}
    graphs = []
    for n in sorted(set(exits or [model.config.num_hidden_layers])):
        graph = ExitGraph(model.config, model.tensors, n, kv_cache=kv_cache, at_once=at_once)
        for name, weight in graph.g.weights.items():
            graph.g.weights[name] = shared.setdefault(name, weight)
        graphs.append(graph)

    digest = hashlib.sha256()
    for part in weight_bytes(shared):
        digest.update(part)
    root = Path(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    data = f"weights-{digest.hexdigest()[:12]}.data"
    _write(root / data, weight_bytes(shared))
    offsets, _ = lay_out(shared)
    paths = []
    for graph in graphs:
        paths.append(root / f"exit-{graph.exit_layer}.onnx")
        _write(paths[-1], [graph.model((data, offsets)).SerializeToString()])
    return paths


def _write(path: Path, parts: Iterable[memoryview | bytes]) -> None:
    with replace_file(path) as file:
        file.writelines(parts)


def weight_bytes(weights: Mapping[str, Weight]) -> Iterator[memoryview | bytes]:
    """The content of an external file, as `lay_out` places it."""
    offsets, total = lay_out(weights)
    ends = pairwise([*offsets.values(), total])
    for weight, (start, after) in zip(weights.values(), ends, strict=True):
        yield weight.data.data
        yield bytes(after - start - weight.data.size)


def find_graphs(path: Path) -> tuple[ModelConfig, str, dict[int, Path]]:
    """Configuration, KV cache, and exit layer -> file, of an .onnx file or a folder of them.

    Raises FormatError if there are none, or they are not ours, or not of one model.
    """
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if not files:
        raise FormatError(f"{path}: neither a model folder nor a folder with .onnx files")
    graphs: dict[int, Path] = {}
    configs = set()
    for file in files:
        try:
            model = onnx.load(file, load_external_data=False)
        except Exception as error:  # protobuf and the file system each have their own types
            raise FormatError(
                f"{file}: cannot be read as an ONNX file ({one_line(error)})"
            ) from None
        metadata = {p.key: p.value for p in model.metadata_props}
        if not {CONFIG_KEY, EXIT_KEY} <= metadata.keys():
            raise FormatError(f"{file}: not written by this project's export")
        try:
            config = ModelConfig.from_dict(json.loads(metadata[CONFIG_KEY]))
            kv_cache = check_kv_cache(metadata.get(CACHE_KEY, "float32"), config)
            graphs[check_exit_layer(int(metadata[EXIT_KEY]), config)] = file
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{file}: its metadata is damaged ({one_line(error)})") from None
        configs.add((config, kv_cache))
    if len(configs) > 1:
        raise FormatError(f"{path}: holds graphs of different models or caches: give one file")
    return *configs.pop(), graphs
