"""`exits`: the curve of loss and speed, its Pareto points, and the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bitskip.program import runtime as main
from bitskip_cpu.heldout.points import Point, points
from bitskip_cpu.heldout.scoring import Stepped
from bitskip_cpu.heldout.work import multiply_adds
from bitskip_ref.config import preset
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.heldout import HeldOutLoss
from bitskip_ref.rule import ExitRule
from tests.cli.conftest import CONFIG

STORY = "the cat sat on a little cat. Once upon a time there was a cat\n<|endoftext|>\n"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(STORY * 3, "utf-8")
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["exits", *map(str, arguments)])


def found(rule: ExitRule, losses: list[float], depth: float, speed: float) -> Stepped:
    """Made up: windows of 10 tokens with these mean losses."""
    sums, sizes = 10 * np.array(losses), np.full(len(losses), 10)
    depths = np.full(10 * len(losses), depth)
    return Stepped(rule, HeldOutLoss(sums, sizes, 1), depths, sizes - 1, (sizes - 1) / speed)


def test_pareto_points_and_the_fixed_exits_of_the_same_depth() -> None:
    made = points(
        [
            found(FixedExit(1), [4.0, 5.0], 1, 400),
            found(FixedExit(2), [3.0, 3.5], 2, 200),
            found(FixedExit(4), [2.0, 2.5], 4, 100),
            found(ConfidenceExit(0.5), [2.25, 2.75], 3, 150),  # between: better than the mixture
            found(ConfidenceExit(0.6), [2.5, 3.0], 3, 110),  # slower and worse than the last
            found(ConfidenceExit(0.7), [2.0, 2.5], 3.5, 100),  # as good and as fast as exit 4
            found(ConfidenceExit(0.8), [2.0, 2.5], 0.5, 50),
        ],
        CONFIG,
    )
    assert [p.pareto for p in made] == [True, True, True, True, False, True, False]
    assert [p.against_fixed for p in made[:3]] == [None] * 3
    more, error = against(made[3])
    assert more == pytest.approx(2.5 - (3.25 + 2.25) / 2) and error == pytest.approx(0)
    more, error = against(made[4])
    assert more == pytest.approx(0.0) and error == pytest.approx(0)
    assert made[6].against_fixed is None  # nothing so shallow was run
    # 150 tokens/s lie a third of the way, in time, from exit 2 to exit 4.
    assert made[3].at_equal_time is not None
    assert made[3].at_equal_time[0] == pytest.approx(2.5 - (3.25 - 1 / 3))
    assert made[6].at_equal_time is None


def test_multiply_adds() -> None:
    """By hand, for 64 x 64 q and o, 32 x 64 k and v, three FFN matrices of 128 x 64, 4 blocks."""
    config = preset("tiny").replace(gates=True)
    skipped, head = 2 * 32 * 64, 64 * 256
    block = 2 * 64 * 64 + skipped + 3 * 64 * 128
    assert sum(r * w for r, w in config.linear_shapes().values()) == block
    depths = np.array([1, 1, 4, 4])
    fixed = multiply_adds(FixedExit(3), config, np.array([3, 3]))
    assert fixed == 3 * block + head
    gate = multiply_adds(GateExit(layers=(1, 2)), config, depths)
    assert gate == 2.5 * block + 1.5 * skipped + head + 1.5 * 16 * 65
    sure = multiply_adds(ConfidenceExit(layers=(1, 2)), config, depths)
    assert sure == 2.5 * block + 1.5 * skipped + 2 * head  # two tokens go on twice


def against(p: Point) -> tuple[float, float]:
    assert p.against_fixed is not None and p.against_fixed[1] is not None
    return p.against_fixed[0], p.against_fixed[1]


def test_json(folder: Path, text_file: Path) -> None:
    options = ("--rule", "max,gate", "--thresholds", "0.02,1", "--ctx", 20, "--exit-last", 3)
    result = run(folder, "--text", text_file, *options, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["context"] == 20 and facts["threads"] == 1
    asked = [(e["exit_layer"], e["threshold"]) for e in facts["exits"]]
    dynamic = [(rule, x) for rule in ("max", "gate") for x in (0.02, 1.0)]
    assert asked == [*((n, None) for n in (1, 2, 3, 4)), *dynamic]
    for e in facts["exits"]:
        assert e["tokens_per_s"] > 0 and e["pareto"] in (True, False)
        assert (e["loss_against_fixed"] is None) == (e["threshold"] is None)
    never = [e for e in facts["exits"] if e["threshold"] == 1.0]
    for e in never:  # at block 3 at the latest
        assert e["loss"] == pytest.approx(facts["exits"][2]["loss"], rel=1e-12)
        assert e["loss_against_fixed"] == pytest.approx(0, abs=1e-12)
    assert any(e["pareto"] for e in facts["exits"])


def test_table(folder: Path, text_file: Path) -> None:
    result = run(folder, "--text", text_file, "--exit-layer", "2,4", "--rule", "none")
    assert result.exit_code == 0, result.stderr
    rows = result.stdout.splitlines()
    assert len(rows) == 5 and "2 " in rows[2] and "4 " in rows[3]
    assert "tokens of held-out.txt, context and stride 64, 1 thread" in rows[4]
    assert "max >" in run(folder, "--text", text_file, "--exit-layer", 4, "--tokens", 9).stdout


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures(folder: Path, text_file: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"exits{suffix}"
    options = ("--rule", "max,entropy", "--thresholds", "0.02,0.05,1", "--plot", picture)
    result = run(folder, "--text", text_file, *options)
    assert result.exit_code == 0, result.stderr
    assert f"picture: {picture}" in result.stdout
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert picture.read_bytes().startswith(start)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"exits{suffix}", "held-out.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "exits.gif"], ".png, .svg, .pdf"),
        (["--plot", "nowhere/exits.png"], "no such folder"),
        (["--thresholds", "high"], "'high' is not a valid float"),
        (["--thresholds", "1.5"], "1.5 is not in the range 0<=x<=1"),
        (["--rule", "fast"], "gate, max, margin, entropy"),
        (["--exit-layer", "5"], "choose 1..4"),
    ],
)
def test_bad_input(folder: Path, text_file: Path, options: list[str], message: str) -> None:
    result = run(folder, "--text", text_file, *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_without_matplotlib_one_line_says_what_to_install(folder: Path, text_file: Path) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from bitskip.program import runtime as main
main(["exits", {str(folder)!r}, "--text", {str(text_file)!r}, "--plot", "x.png"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == 'error: matplotlib is not installed: pip install "bitskip[plot]"\n'
