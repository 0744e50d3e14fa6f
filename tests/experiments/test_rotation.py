"""Rotations before quantizing, on a small model with floats."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bitskip_experiments import subjects
from bitskip_experiments.definitions import load
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.plots import LEVELS
from bitskip_experiments.results import read_results
from bitskip_experiments.rotation import ORDERS, TurnedOps, measure, shape
from bitskip_experiments.subjects import Model, Piece, load_model
from bitskip_train.model import BitskipModel
from tests.helpers import small_twin


@pytest.fixture
def model() -> Model:
    config = small_twin("bitskip-v1").replace(linear="float32", head_format="float32")
    torch.manual_seed(0)
    ids = np.arange(33) % config.vocab_size
    return Model("SmolLM2", config, BitskipModel(config).eval(), "numbers", [Piece(ids, 100)])


@pytest.mark.parametrize("order", ORDERS)
def test_a_rotation_leaves_products_as_they_are(model: Model, order: str) -> None:
    """172 = 43 x 4 is a width that only 5.3 turns whole."""
    ops = TurnedOps(model.groups(), order)
    x, w = torch.randn(5, 172), torch.randn(7, 172)
    for group in ("qkv", "down"):
        turned, rows = ops.turn(group, x), ops.turn(group, w)
        assert torch.allclose(turned @ rows.T, x @ w.T, atol=1e-3)
    assert torch.equal(ops.turn("up", x), x) == (order in ("none", "o and down"))


def test_shapes_of_values() -> None:
    torch.manual_seed(0)
    normal = shape(torch.randn(400, 512))
    assert math.exp(normal["log_kurtosis"]) == pytest.approx(3, rel=0.03)
    at = int(np.searchsorted(LEVELS, 2 - 1e-9))
    assert normal["tail"][at] == pytest.approx(math.erfc(math.sqrt(2)), rel=0.05)
    spike = torch.full((1, 64), 1e-6)
    spike[0, 3] = 1.0
    found = shape(spike)
    assert math.exp(found["log_kurtosis"]) == pytest.approx(64)
    assert math.exp(found["log_peak"]) == pytest.approx(8)
    assert found["tail"][0] == pytest.approx(1 / 64)


def test_outliers_cost_less_when_turned(model: Model) -> None:
    """A feature a hundred times the others, of the kind that a float model has."""
    for i in range(model.config.num_hidden_layers):
        block = model.model.block(i)
        with torch.no_grad():
            block.attn_norm.weight[5] = block.ffn_norm.weight[5] = 100.0
    groups, piece = model.groups(), model.pieces[0]
    with torch.no_grad():
        loss = {
            (order, bits): model.loss(piece, TurnedOps(groups, order, bits))["loss"]
            for order in ("none", "Hartley x Hadamard") for bits in (0, 8, 4)
        }  # fmt: skip
    plain = loss["none", 0]
    assert loss["Hartley x Hadamard", 0] == plain
    gaps = [abs(loss[order, 4] - plain) for order in ("none", "Hartley x Hadamard")]
    assert gaps[1] < gaps[0]
    assert 0 < abs(loss["none", 8] - plain) < gaps[0]


def test_results_are_written_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(subjects.MODELS, "SmolLM2", lambda pieces, data, work: model)
    experiment = load("rotation", "cpu")
    labels = [label for label in experiment.labels if label.startswith("SmolLM2")]
    experiment = replace(experiment, labels=labels, seeds=(0,))
    measure(experiment, tmp_path, tmp_path, tmp_path)
    found = read_results(tmp_path, experiment, None)
    assert list(found) == labels
    figures = found["SmolLM2, blocks"][0]["figures"]
    assert figures["cost"]["8"] == figures["8"]["bits_per_byte"] - figures["float"]["bits_per_byte"]
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.json"))]
    measure(experiment, tmp_path, tmp_path, tmp_path)
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.json"))]


def test_what_is_not_at_hand_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="unknown model 'Llama'; known: SmolLM2"):
        load_model("Llama", 1, tmp_path, tmp_path)
    with pytest.raises(ExperimentError, match="needs --data DIR"):
        load_model("stories-24", 1, None, tmp_path)
    with pytest.raises(ExperimentError, match=r"stories260K\.bin: cannot be read"):
        load_model("stories260K", 1, tmp_path, tmp_path)


def test_a_llama2c_file_is_read(tmp_path: Path) -> None:
    """Tensors in the file's order; pairs of RoPE become halves; merges by the lowest id."""
    shape = dict(dim=8, hidden=12, layers=2, heads=2, kv_heads=1, vocab=262, context=600)
    sizes = [262 * 8, 2 * 8, 2 * 64, 2 * 32, 2 * 32, 2 * 64, 2 * 8, 2 * 96, 2 * 96, 2 * 96, 8]
    values = np.arange(sum(sizes), dtype="<f4") / 1e4
    folder = tmp_path / "stories260K"
    folder.mkdir()
    (folder / "stories260K.bin").write_bytes(struct.pack("<7i", *shape.values()) + values.tobytes())
    words = [b"?"] * 259 + [b" ", b"a", b" a"]
    (folder / "tok512.bin").write_bytes(
        struct.pack("<i", 9) + b"".join(struct.pack("<fi", 0, len(w)) + w for w in words)
    )
    (tmp_path / "tinystories").mkdir()
    story = "a aé" * 300
    (tmp_path / "tinystories/tinystories_valid.txt").write_text(f"{story}\n<|endoftext|>\n")
    found = load_model("stories260K", 1, tmp_path, tmp_path)
    state = found.model.state_dict()
    start = sum(sizes[:2])
    assert state["layers.0.q_proj.weight"][1, 0] == pytest.approx(values[start + 2 * 8])  # pair 1
    assert state["final_norm.weight"][0] == pytest.approx(values[sum(sizes[:-1])])
    ids = found.pieces[0].ids
    # BOS, " a", " a", the two bytes of é, ...
    assert ids[:6].tolist() == [1, 261, 261, 3 + 0xC3, 3 + 0xA9, 260]
    assert len(ids) == subjects.TOKENS + 1 and found.pieces[0].bytes > subjects.TOKENS
