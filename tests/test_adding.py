"""ARCHITECTURE, "Adding things": an example of each, made here as one would make it there.

An instruction set: tests/parity/added_path.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitskip.program import main
from bitskip_cpu.engine import Engine
from bitskip_experiments import definitions
from bitskip_export.pack import pack
from bitskip_export.verify import ENGINES, verify
from bitskip_ref.arithmetic.quant import quantize_weights
from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.dynamic import DynamicExit
from bitskip_ref.files import replace_file
from bitskip_ref.folder import read_folder, write_folder
from bitskip_ref.model import ReferenceModel
from bitskip_ref.packing import unpack_ternary
from bitskip_ref.rule import Probe
from tests.helpers import random_folder, random_parameters, random_tensors, random_tokens, twin
from tests.train.conftest import small_trainer

# ---- an architecture is a value -----------------------------------------------------

NEW = ModelConfig(
    vocab_size=97, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=1, head_dim=8, intermediate_size=40, max_position_embeddings=32,
    ffn="gated_relu2", hadamard=True, norm="layer", gates=True, tie_word_embeddings=True,
    exit_norm="per_layer", head_format="int6", rope_theta=5000.0,
)  # fmt: skip


def test_an_architecture(tmp_path: Path) -> None:
    """It trains, is exported, and runs in all engines with the same bits."""
    run = small_trainer(tmp_path / "run", NEW, dropout_max=0.0)
    losses = [run.train_step()["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    state = {name: tensor.numpy() for name, tensor in run.model.state_dict().items()}
    write_folder(tmp_path / "new", NEW, pack(NEW, state), eos_token_id=0)
    checks = list(
        verify(
            tmp_path / "new", random_tokens(NEW, 9), [2, 3], [n for n in ENGINES if n != "ref"], [1]
        )
    )
    assert len(checks) == 2 * 2 * (len(ENGINES) - 1)
    assert [c.problem for c in checks if c.problem or c.bound is not None] == []


# ---- an exit rule is one file -------------------------------------------------------


@dataclass(frozen=True)
class DoubtfulGate(DynamicExit):
    """The gate decides, but not where the prediction itself is unsure."""

    threshold: float = 0.5
    least: float = 0.1

    def stops(self, probe: Probe) -> bool:
        """Asks for the cheap measure first."""
        return probe.gate() > self.threshold and probe.confidence("margin") > self.least


def test_an_exit_rule() -> None:
    """Every engine asks it; none knows it."""
    config = twin("per-layer-exits")
    tensors = random_tensors(config)
    rule = DoubtfulGate(0.3, 0.02, layers=(1, 2), last=3)
    rule.check(config)
    engines = ReferenceModel(config, tensors), Engine(config, tensors, 1)
    caches = [engine.new_cache() for engine in engines]
    prompt = random_tokens(config, 5)
    for engine, cache in zip(engines, caches, strict=True):
        engine.extend(prompt, cache, exit_layer=3, last_only=True)
    depths = []
    for token in random_tokens(config, 20, seed=2):
        (logits, depth), (fast, same) = (
            engine.step(token, cache, rule) for engine, cache in zip(engines, caches, strict=True)
        )
        assert depth == same and logits.tobytes() == fast.tobytes()
        depths.append(depth)
    assert set(depths) == {1, 2, 3}


# ---- an output format is a module of export -----------------------------------------


def write_npz(folder: Path, out: Path) -> None:
    """Write a model folder as an .npz file with all weights as float32, quantized ones at their
    values. Raises FormatError for what is no model folder."""
    found = read_folder(folder)
    arrays = {}
    for name, tensor in found.tensors.items():
        scale = found.tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith("_proj.weight") and tensor.dtype == np.uint8:
            width = found.config.linear_shapes()[name.split(".")[2]][1]
            tensor = unpack_ternary(tensor, width)
        if scale is not None and name.endswith("weight"):
            arrays[name] = tensor.astype(np.float32) * (
                scale if len(scale) == 1 else scale[:, None]
            )
        elif not name.endswith("scale"):
            arrays[name] = tensor.astype(np.float32)
    with replace_file(out) as file:
        np.savez(file, **arrays)


def test_an_output_format(tmp_path: Path) -> None:
    config = twin("bitskip-v1")
    write_npz(random_folder(tmp_path / "model", config), tmp_path / "model.npz")
    written = np.load(tmp_path / "model.npz")
    parameters = random_parameters(config)
    assert written.files == list(dict.fromkeys(written.files)) and set(written.files) == set(
        parameters
    )
    for name in parameters:
        assert written[name].shape == parameters[name].shape
    codes, alpha = quantize_weights(parameters["layers.1.down_proj.weight"])
    assert (written["layers.1.down_proj.weight"] == codes * alpha).all()
    assert (written["final_norm.weight"] == parameters["final_norm.weight"]).all()


# ---- a table is a TOML file ---------------------------------------------------------

TABLE = """
title = "Ternary beside float32"
source = "ours"
group = "new"
measures = ["training"]
seeds = { cpu = [0], full = [0] }
plot = { kind = "bars", figure = "training.best_ppl" }

[[columns]]
name = "perplexity"
figure = "training.best_ppl"
format = "{:.1f}"
"""
GROUP = """
data = "tinystories"
scales = []
preset = "tiny"

[runs.ternary]
[runs.float32]
model = { linear = "float32", head_format = "float32" }
"""


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "new.toml").write_text(GROUP)
    (tmp_path / "ours.toml").write_text(TABLE)
    (tmp_path / "scales.toml").write_text((definitions.HERE / "scales.toml").read_text())
    monkeypatch.setattr(definitions, "HERE", tmp_path)
    experiment = definitions.load("ours", "cpu")
    assert {p.label: p.model.linear for p in experiment.points} == {
        "ternary": "ternary", "float32": "float32",
    }  # fmt: skip
    result = CliRunner().invoke(main, ["reproduce", "--work", str(tmp_path / "work")])
    assert result.exit_code == 0 and "Ternary beside float32" in result.output
