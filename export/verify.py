"""Every engine against the reference, bit for bit: whole prompts and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bitskip_ref
from bitskip_export import load_onnx
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine

Stages = dict[str, np.ndarray]  # stage -> values, in forward order
# KV cache -> SPEC 4.5, 6.5, 6.8: of a row's largest logit
BOUNDS = {"float32": 1e-5, "float16": 1e-3, "int8": 1e-2}


def _load_reference(path: Path, threads: int, kv_cache: str) -> Engine:
    return bitskip_ref.load(path, kv_cache)


def _load_torch(path: Path, threads: int, kv_cache: str) -> Engine:
    import torch

    from bitskip_train import load_exported

    torch.set_num_threads(threads)
    return load_exported(path, kv_cache)


def _load_numba(path: Path, threads: int, kv_cache: str) -> Engine:
    from bitskip_cpu.engine import load

    return load(path, threads, kv_cache)


def _load_onnx(path: Path, threads: int, kv_cache: str) -> Engine:
    return load_onnx(path, threads=threads, kv_cache=kv_cache)


ENGINES: dict[str, Callable[[Path, int, str], Engine]] = {
    "ref": _load_reference,
    "torch": _load_torch,
    "numba": _load_numba,
    "onnx": _load_onnx,
}
LIBRARY_PRODUCTS = {"torch", "onnx"}  # held to a bound where linear layers are float32 (SPEC 4.5)


@dataclass(frozen=True)
class Check:
    """One comparison. `problem` is None, or one line that names the first difference."""

    engine: str
    threads: int
    exit_layer: int
    mode: str
    bound: float | None  # None: bits were compared; else logits, up to so much (SPEC 4.5)
    problem: str | None


def verify(
    path: Path, ids: Sequence[int], exits: Sequence[int], engines: Sequence[str],
    threads: Sequence[int], kv_cache: str = "float32",
    absent: Callable[[str, ImportError], None] | None = None,
) -> Iterator[Check]:  # fmt: skip
    """Compare engines (names in ENGINES) with the reference on the same tokens and kind of cache.

    absent: told of an engine that cannot be imported, which is then left out; None: ImportError.
    Raises bitskip_ref.FormatError for what is no model folder, ValueError for ids or exits out of
    range.
    """
    reference = bitskip_ref.load(path, kv_cache)
    expected = {n: whole(reference, ids, n) for n in exits}
    for name in engines:
        for count in threads if name != "ref" else [1]:
            try:
                engine = ENGINES[name](path, count, kv_cache)
            except ImportError as error:
                if absent is None:
                    raise
                absent(name, error)
                break
            exact = reference.config.linear != "float32" or name not in LIBRARY_PRODUCTS
            bound = None if exact else BOUNDS[kv_cache]
            for n in exits:
                for mode, run in (("whole", whole), ("token by token", singly)):
                    found = run(engine, ids, n)
                    if bound is None:
                        problem = first_difference(reference.config, expected[n], found)
                    else:
                        problem = beyond_bound(bound, expected[n], found)
                    yield Check(name, count, n, mode, bound, problem)


def whole(engine: Engine, ids: Sequence[int], exit_layer: int) -> Stages:
    """What an engine reports for a prompt."""
    stages: Stages = {}

    def keep(stage: str, values: np.ndarray) -> None:
        stages[stage] = values.copy()

    engine.extend(ids, engine.new_cache(), exit_layer=exit_layer, trace=keep)
    return stages


def singly(engine: Engine, ids: Sequence[int], exit_layer: int) -> Stages:
    """The same from tokens fed one by one."""
    cache, parts = engine.new_cache(), dict[str, list[np.ndarray]]()

    def keep(stage: str, values: np.ndarray) -> None:
        parts.setdefault(stage, []).append(values.copy())

    for token in ids:
        engine.extend([token], cache, exit_layer=exit_layer, trace=keep)
    return {stage: np.concatenate(values) for stage, values in parts.items()}


def first_difference(config: ModelConfig, expected: Stages, actual: Stages) -> str | None:
    """The first stage, in forward order, whose bits differ."""
    for stage, values in expected.items():
        if stage not in actual:
            return f"{stage}: not reported"
        problem = difference(stage, values, actual[stage])
        if problem and stage.startswith("layers."):
            number = int(stage.split(".")[1]) + 1
            return f"block {number} of {config.num_hidden_layers}, {problem}"
        if problem:
            return problem
    return None


def beyond_bound(bound: float, expected: Stages, actual: Stages) -> str | None:
    """Whether logits leave the bound of SPEC 4.5, 6.5 or 6.8."""
    z = expected["logits"]
    gap = np.abs(actual["logits"] - z).max(axis=1) / np.abs(z).max(axis=1)
    if (gap <= bound).all():
        return None
    return f"logits: off by {gap.max():.3g} of the row's largest, the bound is {bound:g}"
