"""`benchmarks.train`: who runs, in what order, and the ratios; never a speed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import train

SMALL = train.Shape(32, 2, 2, 1, 16, 48, vocab_size=64, batch=2, context=8)


def test_models_take_turns() -> None:
    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = train.measure(steps, 3, 0.0, time.process_time)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}


def test_ratios_are_those_of_the_same_round() -> None:
    found = {"v1": [2.0, 6.0, 3.0], "v1 twin": [1.0, 2.0, 2.0], train.LLAMA: [4.0, 4.0, 4.0]}
    assert train.ratio(found, "v1", "v1 twin") == "2.00 (1.50 to 3.00)"
    assert train.ratio(found, "v1 twin", "v1 twin twin") == ""
    lines = train.show(found, 300).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "v1", "3000.0", "100", "2.00 (1.50 to 3.00)", "0.75 (0.50 to 1.50)",
    ]  # fmt: skip


@pytest.mark.parametrize("terms", [[], ["--terms"]])
def test_every_model_runs(
    terms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("transformers")
    monkeypatch.setitem(train.SHAPES, "small", SMALL)
    out = tmp_path / "t.json"
    arguments = ["train", "--shape", "small", "-r", "1", "--turn", "0", "-o", str(out), *terms]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    (shape,) = json.loads(out.read_text())["shapes"].values()
    assert len(shape["seconds"]) == 2 * len(train.MODELS) + 1
    assert "data and draws" in capsys.readouterr().out


def test_the_twin_has_float32_weights_and_no_transform() -> None:
    for preset in train.MODELS.values():
        twin = train.twin(SMALL.model(preset))
        assert (twin.linear, twin.hadamard) == ("float32", False)
        assert twin.ffn == SMALL.model(preset).ffn
