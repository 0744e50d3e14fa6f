"""Exit rules: where they look, what they stop at, their names, and what a folder says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitskip_ref.config import preset
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.exits.named import DYNAMIC, describe_rule, named_rule, rule_label
from bitskip_ref.folder import read_folder, write_auto_exit
from bitskip_ref.rule import ExitRule
from bitskip_ref.tensors import FormatError
from tests.helpers import random_folder, twin

CONFIG = twin("wt2-bitskip")  # four blocks, with gates


class Scripted:
    """A probe that gives one value after the other."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def gate(self) -> np.float32:
        return np.float32(self.values.pop(0))

    def confidence(self, measure: str) -> np.float32:
        return self.gate()


def test_looks() -> None:
    deep = preset("stories-24")
    assert ConfidenceExit().looks(deep) == (6, 12, 18)
    assert GateExit().looks(deep) == tuple(range(1, 24))
    assert GateExit(layers=(9, 3, 9)).looks(deep) == (3, 9)
    for layers, expected in ((1, ()), (2, (1,)), (3, (1, 2)), (4, (1, 2, 3))):
        config = deep.replace(num_hidden_layers=layers)
        assert ConfidenceExit().looks(config) == expected
        assert GateExit().looks(config) == tuple(range(1, layers))
        assert ConfidenceExit(last=layers).looks(deep) == expected
        assert GateExit(last=layers).looks(deep) == tuple(range(1, layers))
        assert ConfidenceExit(last=layers).deepest(deep) == layers
    assert ConfidenceExit(layers=()).looks(deep) == FixedExit().looks(deep) == ()


def test_a_threshold_must_be_exceeded() -> None:
    for rule in (GateExit(0.5), ConfidenceExit(0.5), ConfidenceExit(0.5, "entropy")):
        assert [rule.stops(Scripted(v)) for v in (0.49, 0.5, 0.51)] == [False, False, True]
    assert not ConfidenceExit(1.0).stops(Scripted(1.0))
    assert not ConfidenceExit(0.0, "margin").stops(Scripted(0.0))  # the best two are equal


@pytest.mark.parametrize("exit_layer", [None, 1, 4, *DYNAMIC])
def test_a_rule_has_one_description(exit_layer: int | str | None) -> None:
    rule = named_rule(exit_layer, None, None, None, CONFIG)
    facts = describe_rule(rule, CONFIG)
    assert facts["exit_layer"] == (exit_layer or 4)
    again = named_rule(**json.loads(json.dumps(facts)), config=CONFIG)
    assert describe_rule(again, CONFIG) == facts
    assert again.looks(CONFIG) == rule.looks(CONFIG)


def test_defaults_of_names() -> None:
    assert named_rule("gate", None, None, None, CONFIG) == GateExit(0.5)
    assert named_rule("margin", None, [1, 2], 3, CONFIG) == ConfidenceExit(
        0.9, "margin", layers=(1, 2), last=3
    )
    assert named_rule("entropy", 0.0, None, None, CONFIG) == ConfidenceExit(0.0, "entropy")


def test_labels() -> None:
    for rule, label in (
        (FixedExit(3), "3"),
        (FixedExit(), "4"),
        (ConfidenceExit(0.9), "max > 0.9 at 1, 2, 3, else 4"),
        (ConfidenceExit(0.25, "entropy", layers=(2,), last=3), "entropy > 0.25 at 2, else 3"),
    ):
        assert rule_label(rule, CONFIG) == label
    deep = preset("stories-24").replace(gates=True)
    assert rule_label(GateExit(last=18), deep) == "gate > 0.5 at every block, else 18"


@pytest.mark.parametrize(
    "rule", [FixedExit(3), GateExit(0.25), ConfidenceExit(0.8, "entropy", layers=(2,), last=3)]
)
def test_a_folder_keeps_its_calibrated_exit(tmp_path: Path, rule: ExitRule) -> None:
    path = random_folder(tmp_path / "model", CONFIG)
    before = read_folder(path)
    assert before.auto_exit is None
    write_auto_exit(before, rule, {"budget": 0.04})
    after = read_folder(path)
    assert after.auto_exit is not None
    assert describe_rule(after.auto_exit, CONFIG) == describe_rule(rule, CONFIG)
    stored = json.loads((path / "generation_config.json").read_text())
    assert stored["auto_exit"]["budget"] == 0.04
    assert stored["eos_token_id"] == after.eos_token_id == 0
    assert after.exit_layer is None


@pytest.mark.parametrize(
    "setting",
    [
        {"exit_layer": "max", "threshold": 1.5, "looks": [2], "last": 4},
        {"exit_layer": "max", "threshold": 0.5, "looks": [4], "last": 4},
        {"exit_layer": "max", "threshold": 0.5, "looks": [2], "last": 2},
        {"exit_layer": "max", "threshold": 0.5, "looks": [], "last": 5},
        {"exit_layer": "max", "threshold": "high", "looks": [2], "last": None},
        {"exit_layer": "max", "threshold": 0.5, "looks": ["2"], "last": None},
        {"exit_layer": 5, "threshold": None, "looks": None, "last": None},
        {"exit_layer": "auto", "threshold": None, "looks": None, "last": None},
        {"exit_layer": "max", "threshold": 0.5, "looks": [2]},
        ["max"],
    ],
)
def test_a_wrong_calibrated_exit_is_refused(tmp_path: Path, setting: object) -> None:
    path = random_folder(tmp_path / "model", CONFIG)
    (path / "generation_config.json").write_text(json.dumps({"auto_exit": setting}))
    with pytest.raises(FormatError, match="auto_exit is not a setting of this model"):
        read_folder(path)
