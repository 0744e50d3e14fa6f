"""From nothing to tables: train, resume, measure, render, as a user meets it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitskip_experiments import definitions
from bitskip_experiments import pool as pool_module
from bitskip_experiments.definitions import load
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.pool import Pool
from bitskip_experiments.reproduce import Measuring
from bitskip_experiments.runs import Run, runs_of
from bitskip_train.checkpoint import load_checkpoint
from tests.experiments.conftest import reproduce


def runs(place: Path, name: str, seeds: tuple[int, ...] = (0,)) -> list[Run]:
    return runs_of(load(name, "cpu").points, seeds, place / "data", place / "work")


def test_all_then_again_then_render(mini: Path) -> None:
    done = reproduce(mini, "all", "--jobs", "2")
    assert done.exit_code == 0, done.output
    folder = mini / "results/v2-table1"
    files = sorted(p.name for p in folder.iterdir())
    assert files == [
        "plot.png", "table.csv", "table.md", "with-exits-seed0.json", "with-exits-seed1.json",
    ]  # fmt: skip
    # The sweep's point at 0.2 is the table's run of seed 0: three runs for four uses.
    assert len(list((mini / "work").glob("*/last.pt"))) == 3
    shared = [json.loads(p.read_text())["run"] for p in (
        folder / "with-exits-seed0.json", mini / "results/v2-table2/0.2-seed0.json")]  # fmt: skip
    assert shared[0] == shared[1]
    result = json.loads((folder / "with-exits-seed1.json").read_text())
    assert result["train"]["seed"] == 1
    assert result["environment"]["packages"]["torch"] and result["seconds"]["training"] > 0
    figures = result["figures"]
    assert sorted(figures["exits"]) == ["1", "2", "3"]
    assert figures["exits"]["2"]["tokens"] == 300 and figures["exits"]["2"]["loss_se"] > 0
    assert figures["training"]["steps"] == 3 and len(figures["training"]["curve"]) == 3
    assert set(figures["bypass"]) == {"none", "weights", "activations"}
    shares = [figures["weights"][key] for key in ("zeros", "plus", "minus")]
    assert abs(sum(shares) - 1) < 1e-6 and len(figures["weights"]["matrices"]) == 3 * 6
    assert sorted(figures["activations"]) == ["0", "1", "2", "3"]
    table = (folder / "table.md").read_text()
    assert "| With exits | " in table and " ± " in table and "252.4" in table
    assert "| Ternary less FP | " in table and "- A note.\n" in table
    # Again: nothing to train, nothing to measure.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    again = reproduce(mini, "v2-table1")
    assert again.exit_code == 0 and before == {p: p.stat().st_mtime_ns for p in before}
    # A result that lacks a figure, or is of another checkpoint, is measured again.
    path, wanted = folder / "with-exits-seed1.json", load("v2-table1", "cpu")
    second = runs(mini, "v2-table1", (1,))
    measuring = Measuring([(0, wanted, second)], mini / "results")
    for broken in (
        result | {"figures": {"exits": {}}}, result | {"checkpoint": "last"},
        result | {"measure_tokens": 1},
    ):  # fmt: skip
        path.write_text(json.dumps(broken))
        measuring.measure(second[0])
        again_measured = json.loads(path.read_text())
        assert again_measured["figures"] == figures and again_measured["checkpoint"] == "best"
    # Rendering needs results alone.
    os.rename(mini / "work", mini / "gone")
    (folder / "table.md").unlink()
    assert reproduce(mini, "v2-table1", "--render").exit_code == 0
    assert (folder / "table.md").read_text() == table
    one = reproduce(mini, "v2-table1", "--render", "--seeds", "1")
    assert one.exit_code == 0 and "One seed" in (folder / "table.md").read_text()
    lacks = reproduce(mini, "v2-table1", "--render", "--seeds", "0,5")
    assert lacks.exit_code == 1 and lacks.stderr.count("\n") == 1
    assert "with-exits-seed5.json: no such result; run `reproduce` without --render" in lacks.stderr


def test_a_killed_child_is_reported_and_goes_on_to_the_same_weights(mini: Path) -> None:
    scales = definitions.HERE / "scales.toml"
    scales.write_text(scales.read_text().replace("steps = 3", "steps = 60"))
    first = runs(mini, "v2-table1")[0]
    whole = runs_of([first.point], (0,), mini / "data", mini / "other")[0]
    pool = Pool(jobs=1, say=lambda text: None)

    def kill() -> None:
        while first.step() < 5:
            time.sleep(0.02)
        next(iter(pool._children)).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    pool.train_all([first, whole])
    killer.join()
    assert list(pool.failed) == [first.digest] and "exit code -9" in pool.failed[first.digest]
    assert not first.trained and whole.trained
    resumed_from = load_checkpoint(first.last).step
    assert 0 < resumed_from < 60
    again = Pool(jobs=1, say=lambda text: None)
    again.train_all([first])
    assert first.trained and not again.failed
    assert f"steps {resumed_from}..60" in (first.folder / "train.log").read_text()
    states = [load_checkpoint(run.last).state for run in (first, whole)]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


def test_a_run_that_fails_does_not_speak_for_its_namesake(mini: Path) -> None:
    """Several experiments have a run of the name `Baseline`."""
    first = runs(mini, "v2-table1")[0]
    other = dataclasses.replace(
        first, point=dataclasses.replace(first.point, train=first.point.train.replace(lr=0.5))
    )
    other.folder.mkdir(parents=True)
    other.note(finished=True)

    def measure(run: Run) -> None:
        raise ValueError("no figures")

    pool = Pool(jobs=1, say=lambda text: None, measure=measure)
    assert other.name == first.name and not pool.train(other)
    first.folder.mkdir(parents=True)
    first.note(finished=True)
    pool.measure = lambda run: None
    assert pool.train(first)
    assert list(pool.failed.values()) == [f"{first.name}: no figures"]


def test_what_another_process_trains_is_left_and_then_waited_for(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "WAIT_S", 0.01)
    run = runs(mini, "v2-table1")[0]
    run.folder.mkdir(parents=True)
    said: list[str] = []
    measured: list[Run] = []
    pool = Pool(jobs=1, say=said.append, measure=measured.append)
    with (run.folder / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not pool.train(run)
        assert said == ["With exits, seed 0: another process trains it"]
        end = threading.Timer(0.1, lambda: (run.note(finished=True), other.close()))
        end.start()
        pool.train_all([run])
        end.join()
    assert measured == [run] and not pool.failed


def test_processes_share_a_step(mini: Path) -> None:
    run = runs(mini, "v2-table1")[0]
    for processes, batch in ((1, 2), (2, 1)):
        words = run.command(processes)
        assert f"train.batch={batch}" in words and "train.accumulation=1" in words
        assert ("torch.distributed.run" in words) == (processes > 1)
    with pytest.raises(ExperimentError, match="--nproc 3: divides neither accumulation = 1 nor"):
        run.command(3)


SCRIPT = """
import sys
from pathlib import Path
from bitskip_experiments import definitions
from bitskip_experiments import pool as pool_module
definitions.HERE = Path(sys.argv.pop(1))
import cli
cli.main()
"""


def test_a_signal_stops_the_children_and_the_command_goes_on(mini: Path) -> None:
    scales = definitions.HERE / "scales.toml"
    scales.write_text(scales.read_text().replace("steps = 3", "steps = 100000"))
    words = [
        sys.executable, "-c", SCRIPT, str(definitions.HERE), "reproduce", "v2-table1", "--jobs",
        "1", "--data", str(mini / "data"), "--work", str(mini / "work"), "--results",
        str(mini / "results"),
    ]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    run = runs(mini, "v2-table1")[0]
    while run.step() < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; the same command goes on"
    assert not run.trained and load_checkpoint(run.last).step >= 3
    assert "finished" not in run.about and run.about["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["v9-table1"], "unknown experiment 'v9-table1' (did you mean v2-table1?); known: "),
        (["v2-table1", "--seeds", "0,x"], "'x' is not a valid integer"),
        (["v2-table1", "--render"], "with-exits-seed0.json: no such result"),
        (["v2-table1", "--measure", "speed"], "has no speed columns; v1-table4 has"),
        (["v2-table2", "--storage", "nonsense://x"], "--storage nonsense://x: "),
    ],
)
def test_mistakes_are_one_line(mini: Path, words: list[str], message: str) -> None:
    result = reproduce(mini, *words)
    assert result.exit_code in (1, 2) and message in result.stderr
    assert len([line for line in result.stderr.splitlines() if "rror" in line]) == 1


def test_missing_data_is_one_line(mini: Path) -> None:
    (mini / "data/wikitext-2/wiki.valid.tokens").unlink()
    result = reproduce(mini, "v2-table1")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "--data DIR must hold wikitext-2/wiki.valid.tokens" in result.stderr


def test_the_list_tells_the_state(mini: Path) -> None:
    result = reproduce(mini)
    assert result.exit_code == 0
    assert "v2-table1" in result.stdout and "0 of 2" in result.stdout


def test_rendering_imports_neither_torch_nor_optuna(mini: Path) -> None:
    code = SCRIPT.replace(
        "cli.main()",
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'optuna', 'transformers'} & set(sys.modules)",
    )
    words = [str(definitions.HERE), "reproduce", "all", "--render", "--results", str(mini)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
