"""Files that `write_onnx` leaves, and the engine on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from bitskip_export import load_onnx
from bitskip_export.onnx_builder import GraphBuilder, value_info
from bitskip_export.onnx_files import write_onnx
from bitskip_export.onnx_graph import CACHE_KEY, CONFIG_KEY, EXIT_KEY, build_graph
from bitskip_export.onnx_ops import half
from bitskip_ref.arithmetic import functions
from bitskip_ref.compare import difference
from bitskip_ref.exits import ConfidenceExit
from bitskip_ref.model import ReferenceModel, load
from bitskip_ref.tensors import FormatError
from tests.helpers import random_folder, random_tensors, random_tokens, twin

CONFIG = twin("bitskip-v1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_folder(tmp_path / "model", CONFIG)


def test_files_run_in_onnxruntime_alone(model: Path, tmp_path: Path) -> None:
    paths = write_onnx(model, tmp_path / "onnx", [4, 2])
    assert [p.name for p in paths] == ["exit-2.onnx", "exit-4.onnx"]
    assert len(list((tmp_path / "onnx").glob("weights-*.data"))) == 1
    ids = random_tokens(CONFIG, 5)
    for path, n in zip(paths, (2, 4), strict=True):
        onnx.checker.check_model(path, full_check=True)
        session = ort.InferenceSession(path)
        assert session.get_modelmeta().custom_metadata_map["bitskip.exit"] == str(n)
        assert session.get_modelmeta().custom_metadata_map["bitskip.arithmetic"] == "exact"
        empty = np.zeros((0, CONFIG.num_key_value_heads, CONFIG.head_dim), np.float32)
        feeds = {i.name: empty for i in session.get_inputs()} | {"token_ids": np.array(ids)}
        logits = session.run(["logits"], feeds)[0]
        assert difference("logits", load(model).logits(ids, n), logits) is None


def test_a_graph_with_its_weights_inside(tmp_path: Path) -> None:
    model = build_graph(CONFIG, random_tensors(CONFIG), 2)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "one.onnx")
    engine = load_onnx(tmp_path / "one.onnx")
    ids = random_tokens(CONFIG, 5)
    expected = ReferenceModel(CONFIG, random_tensors(CONFIG)).logits(ids, 2)
    assert difference("logits", expected, engine.logits(ids, 2)) is None


def test_the_graph_stays_as_written(model: Path, tmp_path: Path) -> None:
    """At the highest level ONNX Runtime fuses nothing into operators with an order of their own."""
    path = write_onnx(model, tmp_path / "onnx")[0]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(path, options)
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    kinds = {node.op_type for node in nodes}
    assert not kinds & {"MatMul", "Exp", "Sigmoid", "ReduceSum", "ReduceMean", "Softmax", "Pow"}


def test_the_engine_on_files(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    write_onnx(model, out, [2])
    write_onnx(model, out, [4])  # another weights file; the first graph keeps its own
    ids, engine = random_tokens(CONFIG, 5), load_onnx(out)
    for n in (2, 4):
        assert difference("logits", load(model).logits(ids, n), engine.logits(ids, n)) is None
    assert load_onnx(out / "exit-2.onnx").logits(ids, 2).shape == (5, CONFIG.vocab_size)
    with pytest.raises(ValueError, match=r"no graph of exit 3, only of \[2, 4\]"):
        engine.logits(ids, 3)
    with pytest.raises(ValueError, match="no stages to trace"):
        engine.extend(ids, engine.new_cache(), trace=lambda *_: None)


def test_a_float16_cache(model: Path, tmp_path: Path) -> None:
    """The type is in the file; a session holds half the bytes; ties and what is too large."""
    out, ids = tmp_path / "onnx", random_tokens(CONFIG, 5)
    write_onnx(model, out, [4], "float16")
    for engine in (load_onnx(out), load_onnx(out, kv_cache="float16")):
        cache = engine.new_cache()
        expected = load(model, "float16").logits(ids)
        assert difference("logits", expected, engine.extend(ids, cache)) is None
        assert {x.dtype for x in cache.keys + cache.values} == {np.dtype(np.float16)}
    with pytest.raises(ValueError, match="was written for a float16 KV cache: export with"):
        load_onnx(out, kv_cache="float32")
    write_onnx(model, out, [2])
    with pytest.raises(FormatError, match="different models or caches"):
        load_onnx(out)
    with pytest.raises(ValueError, match="KV cache 'int4'"):
        load_onnx(model, kv_cache="int4")


def test_an_int8_cache(model: Path, tmp_path: Path) -> None:
    """SPEC 6.8 from files: codes and steps are inputs and outputs of their own."""
    out, ids = tmp_path / "onnx", random_tokens(CONFIG, 5)
    write_onnx(model, out, [4], "int8")
    engine = load_onnx(out)
    cache = engine.new_cache()
    expected = load(model, "int8").logits(ids)
    assert difference("logits", expected[:3], engine.extend(ids[:3], cache)) is None
    assert difference("logits", expected[3:], engine.extend(ids[3:], cache)) is None
    kinds = {name: blocks[0].dtype.name for name, blocks in cache.arrays.items()}
    assert kinds == {
        "keys": "int8", "key_steps": "float32", "values": "int8", "value_steps": "float32",
    }  # fmt: skip


def test_rounding_to_float16_in_onnxruntime(model: Path) -> None:
    """SPEC 6.5: the Cast of this library on ties, subnormals and what is too large."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(4096) * 2.0 ** rng.integers(-30, 30, 4096)
    ties = (np.arange(4096) + 0.5) * 2.0**-24 * 2.0 ** (np.arange(4096) % 3)
    x = np.concatenate([wide, ties, -ties, [65519.0, 65520.0, 1e30, -1e30, 0.0, -0.0]])
    g = GraphBuilder()
    y = half(g, "x")
    outputs = [value_info(y, np.float16, ["N"])]
    made = g.model("half", [value_info("x", np.float32, ["N"])], outputs, {})
    session = ort.InferenceSession(made.SerializeToString())
    found = session.run(None, {"x": x.astype(np.float32)})[0]
    assert difference("halves", functions.half(x.astype(np.float32)), found) is None


def test_misuse_is_refused(model: Path) -> None:
    engine = load_onnx(model)
    cache = engine.new_cache()
    with pytest.raises(ValueError, match="fixed number of blocks"):
        engine.step(1, cache, ConfidenceExit(0.5))
    with pytest.raises(ValueError, match="out of range"):
        engine.logits([1], 5)
    with pytest.raises(ValueError, match="no tokens"):
        engine.logits([])
    with pytest.raises(ValueError, match=r"integers in 0\.\.96"):
        engine.logits([97])
    engine.extend([1, 2], cache, exit_layer=2)
    with pytest.raises(ValueError, match="was filled at exit layer"):
        engine.extend([3], cache, exit_layer=4)
    engine.extend([3], cache, exit_layer=1)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither a model folder nor"):
        load_onnx(tmp_path)
    path = tmp_path / "x.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(FormatError, match="cannot be read as an ONNX file"):
        load_onnx(path)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), path)
    with pytest.raises(FormatError, match="not written by this project"):
        load_onnx(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [(CONFIG_KEY, "[" * 100_000), (CONFIG_KEY, "5"), (EXIT_KEY, "x"), (EXIT_KEY, "99"),
     (CACHE_KEY, "int3")],
)  # fmt: skip
def test_damaged_metadata_is_refused(key: str, value: str, model: Path, tmp_path: Path) -> None:
    (path,) = write_onnx(model, tmp_path)
    graph = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    onnx.helper.set_model_props(graph, metadata | {key: value})
    onnx.save(graph, path)
    with pytest.raises(FormatError, match="metadata is damaged"):
        load_onnx(path)
