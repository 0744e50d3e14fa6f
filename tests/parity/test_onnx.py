"""ONNX graphs against the reference: every stage, exit, optimization level, thread count."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bitskip_ref
from bitskip_export import load_onnx
from bitskip_export.onnx_engine import OnnxModel
from bitskip_ref.compare import difference
from bitskip_ref.exits import FixedExit
from bitskip_ref.folder import write_folder
from bitskip_ref.model import ReferenceModel
from bitskip_ref.packing import pack_ternary, unpack_ternary
from tests.helpers import OPTIONS, QUANTIZED, random_folder, random_tensors, random_tokens, twin
from tests.parity.engine_check import exits_of

Folder = Callable[[str], Path]
LEVELS = {"none": 0, "basic": 1, "extended": 2, "layout": 3, "all": 99}
# Presets that differ in size alone have one small twin.
NAMES = list({twin(name): name for name in reversed([*QUANTIZED, *OPTIONS])}.values())
SMALLER = [(n, kind) for n in ("bitskip-v3", "wt2-bitskip") for kind in ("float16", "int8")]
FLOAT32 = ["layerskip", "llama3"]
CONTEXT = 64  # of the small twins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """name -> a random model's folder, written once."""
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: random_folder(root / name, twin(name)))


@functools.cache
def stages(
    name: str, exit_layer: int, tokens: int = 7, kv_cache: str = "float32"
) -> list[tuple[str, np.ndarray]]:
    """What the reference reports for a prompt."""
    model = ReferenceModel(twin(name), random_tensors(twin(name)), kv_cache)
    return traced(model, random_tokens(model.config, tokens), exit_layer)


def traced(
    engine: ReferenceModel | OnnxModel, ids: list[int], exit_layer: int
) -> list[tuple[str, np.ndarray]]:
    found: list[tuple[str, np.ndarray]] = []
    cache = engine.new_cache()
    engine.extend(ids, cache, exit_layer=exit_layer, trace=lambda n, x: found.append((n, x.copy())))
    return found


def ignore(stage: str, values: np.ndarray) -> None:
    """A trace, so that the tracing graph is used again and no other is built."""


def equal(name: str, expected: np.ndarray, actual: np.ndarray) -> None:
    assert (report := difference(name, expected, actual)) is None, report


@pytest.mark.parametrize(("name", "kv_cache"), [*((n, "float32") for n in NAMES), *SMALLER])
def test_every_stage_and_token_by_token(name: str, kv_cache: str, folder: Folder) -> None:
    engine = load_onnx(folder(name), threads=1, kv_cache=kv_cache)
    ids = random_tokens(twin(name), 7)
    for exit_layer in (1, 4):
        expected = stages(name, exit_layer, kv_cache=kv_cache)
        found = traced(engine, ids, exit_layer)
        assert [stage for stage, _ in found] == [stage for stage, _ in expected]
        for (stage, values), (_, actual) in zip(expected, found, strict=True):
            equal(f"exit {exit_layer}, {stage}", values, actual)
        cache = engine.new_cache()
        engine.extend(ids[:2], cache, exit_layer=exit_layer, trace=ignore)
        for t in range(2, 7):
            logits, depth = engine.step(ids[t], cache, FixedExit(exit_layer), ignore)
            assert depth == exit_layer
            equal(f"exit {exit_layer}, token {t}", expected[-1][1][t], logits)


@pytest.mark.parametrize(("name", "kv_cache"), [*((n, "float32") for n in NAMES), *SMALLER])
def test_every_optimization_level_and_thread_count(
    name: str, kv_cache: str, folder: Folder
) -> None:
    expected = stages(name, 2, kv_cache=kv_cache)[-1][1]
    ids = random_tokens(twin(name), 7)
    for level, threads in [("none", 1), ("basic", 2), ("extended", 1), ("layout", 2), ("all", 2)]:
        engine = load_onnx(
            folder(name), threads=threads, optimization=LEVELS[level], kv_cache=kv_cache
        )
        equal(f"logits at level {level!r}", expected, engine.logits(ids, 2))


@pytest.mark.parametrize("name", ["bitskip-v3", "wt2-bitskip"])
def test_a_full_context_in_pieces(name: str, folder: Folder) -> None:
    """Lengths on both sides of the chunks and powers of two of the positions tree."""
    engine, ids = load_onnx(folder(name)), random_tokens(twin(name), CONTEXT)
    expected = stages(name, 2, CONTEXT)[-1][1]
    cache, start = engine.new_cache(), 0
    for length in (1, 6, 1, 1, 7, 16, 1, 30, 1):
        part = engine.extend(ids[start : start + length], cache, exit_layer=2)
        equal(f"from {start}", expected[start : start + length], part)
        start += length
    assert cache.length == start == CONTEXT
    with pytest.raises(ValueError, match="exceed the context"):
        engine.extend([0], cache, exit_layer=2)


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_models_stay_within_the_bound(name: str, folder: Folder) -> None:
    """SPEC 4.5: library products, so a bound and not bits."""
    engine = load_onnx(folder(name))
    for exit_layer in (2, 4):
        expected = stages(name, exit_layer)[-1][1]
        actual = engine.logits(random_tokens(twin(name), 7), exit_layer)
        bound = 1e-5 * np.abs(expected).max(axis=1, keepdims=True)
        assert actual.dtype == np.float32 and (np.abs(actual - expected) <= bound).all()


def test_a_fixed_exit_without_a_number_is_full_depth(folder: Folder) -> None:
    engine, ids = load_onnx(folder("tiny")), random_tokens(twin("tiny"), 7)
    logits, depth = engine.step(ids[0], engine.new_cache(), FixedExit())
    assert depth == 4
    equal("logits", stages("tiny", 4)[-1][1][0], logits)


@pytest.mark.parametrize("name", ["tiny", "float32-head", "bitnet-2b4t"])
def test_a_graph_refuses_ids_that_the_engine_refuses(name: str, folder: Folder) -> None:
    engine = load_onnx(folder(name))  # faults B10: -1 was the last token
    c = engine.config
    assert c.tie_word_embeddings == (name == "bitnet-2b4t")
    past = np.zeros((0, c.num_key_value_heads, c.head_dim), np.float32)
    feeds = {f"past.{i}.{kind}": past for i in range(2) for kind in ("key", "value")}
    session = engine.session(2)
    for wrong in (-1, -c.vocab_size, c.vocab_size):
        with pytest.raises(ValueError, match="token ids must be"):
            engine.logits([1, wrong], 2)
        with pytest.raises(Exception, match=r"(?i)out of.*bounds"):
            session.run(["logits"], {"token_ids": np.array([1, wrong]), **feeds})


def test_last_only_is_the_last_row(folder: Folder) -> None:
    engine, expected = load_onnx(folder("tiny")), stages("tiny", 4)[-1][1]
    ids = random_tokens(twin("tiny"), 7)
    equal("logits", expected[-1:], engine.extend(ids, engine.new_cache(), last_only=True))


def test_a_flipped_weight_is_seen(folder: Folder, tmp_path: Path) -> None:
    """The comparison can fail: one code of one weight changes the logits."""
    config, tensors, name = twin("tiny"), random_tensors(twin("tiny")), "layers.1.down_proj.weight"
    codes = unpack_ternary(tensors[name], config.intermediate_size)
    codes[5, 3] = 1 if codes[5, 3] < 1 else 0
    write_folder(tmp_path, config, tensors | {name: pack_ternary(codes)})
    logits = load_onnx(tmp_path).logits(random_tokens(config, 7))
    assert difference("logits", stages("tiny", 4)[-1][1], logits)


def test_every_exit_at_once(folder: Folder) -> None:
    reference, ids = bitskip_ref.load(folder("per-layer-exits")), random_tokens(twin("tiny"), 6)
    expected = exits_of(reference, ids, 4)
    for stage, values in exits_of(load_onnx(folder("per-layer-exits")), ids, 4).items():
        equal(stage, expected[stage], values)
