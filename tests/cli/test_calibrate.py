"""`calibrate`: settings are judged and run, the fastest within the budget is kept."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import bitskip_cpu
from bitskip.program import runtime as main
from bitskip_cpu.engine import Engine
from bitskip_cpu.heldout import calibrate as module
from bitskip_cpu.heldout import scoring
from bitskip_cpu.heldout.calibrate import Calibration
from bitskip_cpu.heldout.scoring import step_through
from bitskip_cpu.heldout.survey import Costs, Survey, look_layers
from bitskip_cpu.heldout.text import Text
from bitskip_ref.config import preset
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.exits.named import describe_rule
from tests.cli.conftest import CONFIG, write_model

MEASURES = ("max", "margin", "entropy", "gate")
STORY = "the cat sat on a little cat. Once upon a time there was a cat\n<|endoftext|>\n"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model folder that may be written."""
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(STORY * 6, "utf-8")
    return path


def text_of(count: int) -> Text:
    return Text(np.random.default_rng(3).integers(0, CONFIG.vocab_size, count), 2 * count, 1)


class Worker:
    """An engine whose steps take as many seconds as they run blocks, and 0.25 for each look."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.config, self.now = engine, engine.config, 0.0
        self.new_cache, self.extend = engine.new_cache, engine.extend
        self.extend_exits, self.step_many = engine.extend_exits, engine.step_many
        monkeypatch.setattr(scoring.time, "perf_counter", lambda: self.now)

    def beside(self) -> list[Any]:
        return [self]

    def step(self, token_id: int, cache: Any, rule: Any) -> Any:
        z, depth = self.engine.step(token_id, cache, rule)
        self.now += depth + 0.25 * sum(n <= depth for n in rule.looks(self.config))
        return z, depth


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


def test_where_settings_are_tried() -> None:
    deep = preset("stories-24")
    assert look_layers("max", deep) == (4, 6, 8, 10, 12, 14, 16, 18, 20, 22)
    assert look_layers("gate", deep) == tuple(range(1, 24))
    assert look_layers("entropy", CONFIG) == (1, 2, 3)
    assert look_layers("max", deep.replace(num_hidden_layers=1)) == ()


def test_a_survey_judges_what_stepping_does(folder: Path) -> None:
    """Depths and losses, where no token of a window is stopped before another is predicted."""
    engine, text = bitskip_cpu.load(folder).engine, text_of(60)
    survey = Survey(engine, text, MEASURES, context=2)  # a prompt of one token and one step
    costs = Costs(1.0, 2.0, dict.fromkeys(MEASURES, 0.5))
    for measure in MEASURES:
        for layers, last in (((2,), 4), ((1, 3), 4), ((1, 2), 3), ((), 2)):
            for threshold in (0.0, *survey.thresholds(measure, (1, 2, 3))[5:15:3], 1.0):
                found = survey.judge(measure, threshold, layers, last, costs)
                (ran,) = step_through(engine, text, [found.rule], context=2)
                assert found.loss == pytest.approx(ran.losses.loss, rel=1e-12)
                assert found.depth == pytest.approx(ran.mean_depth)
                assert found.seconds >= 1 + 2 * found.depth


def test_costs_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(bitskip_cpu.load(folder).engine, monkeypatch)
    costs = Costs.measure(worker, text_of(100), ["max", "gate"])
    assert (costs.base, costs.block) == pytest.approx((0, 1))
    assert costs.looks == pytest.approx({"max": 0.25, "gate": 0.25})


@pytest.mark.parametrize("budget", [0.0, 0.004, 0.05])
def test_the_fastest_within_the_budget_is_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    worker = Worker(bitskip_cpu.load(folder).engine, monkeypatch)
    text = text_of(120)
    calibration = Calibration(worker, text, budget, [], 16)
    calibration.run()
    assert calibration.full.rule == FixedExit(4)
    kinds = {c.kind for c in calibration.candidates}
    assert "fixed" in kinds and len(kinds) > 2
    good = []
    for c in calibration.candidates:
        ratio = c.found.losses.ppl / calibration.full.losses.ppl
        assert c.increase == pytest.approx(ratio - 1)
        assert c.speedup is not None
        if c.increase + 1.64 * (c.increase_se or 0) <= budget and c.speedup > 1:
            good.append(c)
    chosen = calibration.choice()
    assert chosen is (max(good, key=lambda c: c.speedup) if good else None)
    if chosen:
        again = step_through(worker, text, [chosen.found.rule], context=16)[0]
        assert again.losses.loss == chosen.found.losses.loss


def test_what_is_chosen_becomes_auto(copy: Path, text_file: Path) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    looked = run(copy, "--text", text_file, "--dry-run")
    assert looked.exit_code == 0, looked.stderr
    assert "not written" in looked.stdout
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    result = run(copy, "--text", text_file, "--json", "--budget", 0.1, "--ctx", 20)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    found = facts["auto_exit"]
    assert facts["written"] and (found["budget"], found["context"]) == (0.1, 20)
    assert found["text"] == "held-out.txt" and found["tokens"] > 50
    assert math.log(found["loss"] / found["full_loss"]) < 0.1
    after = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == ["generation_config.json"]
    stored = json.loads(after["generation_config.json"])
    assert stored.pop("auto_exit") == found
    assert stored == json.loads(before["generation_config.json"])
    model = bitskip_cpu.load(copy)
    asked = {name: found[name] for name in ("exit_layer", "threshold", "looks", "last")}
    assert describe_rule(model.exit_rule("auto"), model.config) == asked
    assert model.generate("Once", max_tokens=5, exit_layer="auto").token_ids


def test_what_could_be_above_the_budget_is_not_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D1: the choice goes by the increase and 1.64 of its standard errors, not by the estimate."""
    calibration = Calibration(bitskip_cpu.load(folder).engine, text_of(40), 0.04, [], 16)
    sure = module.Candidate("max", None, 0.03, 0.006, 1.2)  # type: ignore[arg-type]
    vague = module.Candidate("gate", None, 0.02, 0.013, 1.9)  # type: ignore[arg-type]
    calibration.candidates = [sure, vague]
    assert calibration.choice() is sure
    calibration.budget = 0.0414
    assert calibration.choice() is vague


def test_a_budget_in_percent(copy: Path, text_file: Path) -> None:
    words = (copy, "--text", text_file, "--tokens", 50, "--rule", "fixed", "--json", "--dry-run")
    for given, meant in (("4%", 0.04), ("0.04", 0.04), ("100%", 1.0), ("0", 0.0)):
        facts = json.loads(run(*words, "--budget", given).stdout)
        assert facts["auto_exit"]["budget"] == meant


def test_kinds_can_be_chosen(copy: Path, text_file: Path) -> None:
    options = (copy, "--text", text_file, "--tokens", 50, "--budget", 1, "--json")
    facts = json.loads(run(*options, "--rule", "fixed,entropy").stdout)
    assert {c["exit_layer"] for c in facts["candidates"]} <= {1, 2, 3, 4, "entropy"}
    facts = json.loads(run(*options, "--rule", "gate").stdout)
    assert {c["exit_layer"] for c in facts["candidates"]} == {"gate"}


def test_nothing_is_lost_when_it_breaks_off(
    copy: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = copy / "generation_config.json"
    before = generation.read_bytes()
    for error, code in ((KeyboardInterrupt(), 130), (MemoryError(), 1)):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(module, "step_through", fail)
        assert run(copy, "--text", text_file).exit_code == code
        assert generation.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "-0.1"], "between 0 and 1"),
        (["--budget", "4"], "4 is not between 0 and 1; 4% is 4 percent"),
        (["--budget", "400%"], "between 0 and 1"),
        (["--budget", "nan"], "no finite number"),
        (["--rule", "fixed,fast"], "unknown rule 'fast'; known: fixed, gate, max, margin, entropy"),
        (["--ctx", "65"], "choose 1..64"),
        (["--text", "nowhere.txt"], "does not exist"),
    ],
)
def test_bad_input(copy: Path, text_file: Path, options: list[str], message: str) -> None:
    result = run(copy, "--text", text_file, *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_what_cannot_be(
    copy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_model(tmp_path / "plain", CONFIG.replace(gates=False))
    assert "choose of fixed, max" in run(plain, "--text", text_file, "--rule", "gate").stderr
    one = write_model(tmp_path / "one", CONFIG.replace(num_hidden_layers=1))
    result = run(one, "--text", text_file)
    assert result.exit_code == 0 and "--exit-layer auto: 1;" in result.stdout
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and access(p, mode))
    assert "cannot be written" in run(copy, "--text", text_file).stderr


def test_a_measured_rule_is_the_engines(folder: Path) -> None:
    """The reference steps to the same losses, so that a calibration does not hang on the engine."""
    import bitskip_ref

    text, rule = text_of(20), ConfidenceExit(0.02, "entropy", layers=(1, 2), last=3)
    found = [
        step_through(engine, text, [rule])[0]
        for engine in (bitskip_cpu.load(folder), bitskip_ref.load(folder))
    ]
    assert found[0].losses.loss == found[1].losses.loss
    assert found[0].depths.tolist() == found[1].depths.tolist()
    assert isinstance(bitskip_cpu.load(folder).engine, Engine)
