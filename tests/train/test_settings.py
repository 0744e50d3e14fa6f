"""Settings, recipes, files and overrides."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitskip_ref.config import PRESETS, ConfigError, ModelConfig
from bitskip_train.described import to_toml
from bitskip_train.recipes import RECIPES, apply, parse_overrides, read_toml, recipe
from bitskip_train.settings import TrainConfig, check_settings


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_consistent(name: str) -> None:
    model, train = recipe(name)
    check_settings(model, train)
    assert TrainConfig.from_dict(train.to_dict()) == train


def test_recipes_of_the_papers() -> None:
    v1, v2 = RECIPES["bitskip-v1"][1], RECIPES["bitskip-v2"][1]
    assert (v1.lr, v1.warmup, v1.clip) == (6e-4, 1000, 1.0)
    assert (v2.lr, v2.warmup, v2.clip) == (3e-4, 4000, 0.5)
    assert {t.batch * t.accumulation for t in (v1, v2)} == {64}
    plain = RECIPES["bitskip-v1-phase1"][1]
    assert (plain.exit_lambda, plain.dropout_max) == (0.0, 0.0)
    assert (v1.exit_lambda, v1.dropout_max) == (0.3, 0.5)
    wt2 = {n: RECIPES[f"wt2-{n}"] for n in ("baseline", "h", "ee", "bitskip")}
    assert [m.hadamard for m, _ in wt2.values()] == [False, True, False, True]
    assert [t.exit_lambda for _, t in wt2.values()] == [0.0, 0.0, 0.3, 0.3]
    assert [t.dropout_max for _, t in wt2.values()] == [0.0, 0.0, 0.7, 0.7]
    assert {(t.route_lambda, t.quant_lambda, t.seed, t.patience) for _, t in wt2.values()} == {
        (0.2, 0.05, 7, 3)
    }
    assert {t.batch * t.accumulation for _, t in wt2.values()} == {128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "fast"}, "must be of type float"),
        ({"lr": 0.0}, "from 1e-12"),
        ({"lr": math.nan}, "from 1e-12"),
        ({"steps": 2.5}, "must be of type int"),
        ({"steps": True}, "must be of type int"),
        ({"compile": 1}, "must be of type bool"),
        ({"schedule": "step"}, "one of linear, cosine, wsd"),
        ({"warmup": -1}, "from 0"),
        ({"exit_layers": 3}, "list of int"),
        ({"exit_layers": [1, "2"]}, "list of int"),
        ({"exit_layers": [1, 2], "exit_shares": [1]}, "one for each of"),
        ({"exit_layers": [1, 2], "exit_shares": [1, 0]}, "from 1"),
        ({"exit_shares": [1]}, "which are none"),
        ({"eval_exits": [2, 2]}, "different layers"),
        ({"dropout_max": 1.5}, "from 0 to 1"),
        ({"patience": 3}, "needs eval_every"),
        ({"threads": 1 << 40}, "threads = .* from 0 to 4096"),
        ({"min_lr": 1.0}, "not be above lr"),
        ({"learning_rate": 1.0}, r"unknown field\(s\): learning_rate; known: data, valid"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(changes)


def test_overrides() -> None:
    changes = parse_overrides(
        ["model.hidden_size=32", "lr=3e-4", "train.exit_layers=6,12", "eval_exits=[3]",
         "schedule=cosine", "hadamard = true", "tokenizer=a=b.json", "data=x.txt,y z.txt"]
    )  # fmt: skip
    model, train = apply(recipe("tiny"), changes)
    assert (model.hidden_size, model.hadamard) == (32, True)
    assert (train.lr, train.exit_layers, train.eval_exits) == (3e-4, (6, 12), (3,))
    assert (train.schedule, train.tokenizer, train.data) == (
        "cosine", "a=b.json", ("x.txt", "y z.txt"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="must be of type int"):
        apply(recipe("tiny"), parse_overrides(["steps=soon"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "must be KEY=VALUE"),
        ("rate=1", "unknown setting 'rate'"),
        ("model.lr=1", "unknown setting 'lr'; known: activation_bits"),
        ("optimizer.lr=1", "unknown table 'optimizer'; known: model, train"),
    ],
)
def test_wrong_overrides(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides([text])


def test_no_key_is_in_both_tables() -> None:
    assert not set(vars(PRESETS["tiny"])) & set(vars(TrainConfig()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "not TOML"),
        ("lr = 1", "'lr' is no table"),
        ("[data]\nx = 1", "'data' is no table"),
        ("[train]\nrate = 1", r"train\.rate: unknown setting 'rate'; known: accumulation"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_toml(path)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[model]\nhidden_size = 32\n[train]\nexit_layers = [1, 2]\nlr = 1\n")
    model, train = apply(recipe("tiny"), read_toml(path))
    assert (model.hidden_size, train.exit_layers, train.lr) == (32, (1, 2), 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_settings_as_toml_are_the_same_settings(name: str) -> None:
    model, train = recipe(name)
    tables = tomllib.loads(to_toml(model, train))
    assert (ModelConfig.from_dict(tables["model"]), TrainConfig.from_dict(tables["train"])) == (
        model, train,
    )  # fmt: skip


@settings(deadline=None)  # a busy machine is no mistake
@given(
    places=st.lists(st.text(st.characters(codec="utf-8"))), lr=st.floats(1e-12, 10.0),
    layers=st.lists(st.integers(1, 99), unique=True),
)  # fmt: skip
def test_any_value_survives_toml(places: list[str], lr: float, layers: list[int]) -> None:
    train = TrainConfig(data=tuple(places), lr=lr, exit_layers=tuple(layers))
    assert TrainConfig.from_dict(tomllib.loads(to_toml(PRESETS["tiny"], train))["train"]) == train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["a\udcff.txt"]}, "must be text in UTF-8"),
        ({"tokenizer": "\udcff"}, "must be text in UTF-8"),
        ({"lr": 10**400}, "lr: the number is too large"),
        ({"warmup": 10**400}, "must be from 0 to"),
        ({"quant_lambda": math.inf}, "must be from 0 to 1e"),
    ],
)
def test_values_that_no_file_can_spell(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)
