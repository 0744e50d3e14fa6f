"""Sweeps: every point of the grid once, and the study told of all, whatever happened before."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from bitskip_experiments.definitions import load
from bitskip_experiments.pool import Pool
from bitskip_experiments.runs import Run, runs_of
from bitskip_experiments.sweep import sweep


class FakePool(Pool):
    """Trains by writing what a trained run leaves; refuses the labels in `bad`."""

    def __init__(self, *bad: str) -> None:
        super().__init__(jobs=2, say=lambda text: None)
        self.bad, self.trained = bad, []  # type: ignore[var-annotated]

    def train(self, run: Run, wait: bool = False) -> bool:
        """As the real one."""
        if run.point.label in self.bad:
            self.failed[run.digest] = f"{run.name}: bad"
            return False
        if not run.trained:
            self.trained.append(run.point.label)
            run.note(finished=True)
            entry = {"step": 1, "valid_loss": 1 + float(run.point.label)}
            (run.folder / "history.jsonl").write_text(json.dumps(entry) + "\n")
        return True


@pytest.mark.parametrize("shared", [False, True])
def test_a_sweep_is_finished_by_a_later_one(mini: Path, shared: bool) -> None:
    experiment = load("v2-table2", "cpu")
    runs = runs_of(experiment.points, (0,), mini / "data", mini / "work")
    url = f"sqlite:///{mini}/study.db" if shared else None
    first = FakePool("0.2")
    sweep(experiment, runs, first, url, mini / "work")
    assert first.trained == ["0.0"] and list(first.failed.values()) == ["0.2, seed 0: bad"]
    second = FakePool()
    sweep(experiment, runs, second, url, mini / "work")
    assert second.trained == ["0.2"]
    sweep(experiment, runs, FakePool("0.0", "0.2"), url, mini / "work")  # nothing is left to do
    if url:
        (name,) = optuna.get_all_study_names(url)
        study = optuna.load_study(study_name=name, storage=url)
        assert name.startswith("v2-table2-") and study.best_params == {"route_lambda": 0.0}
        complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        values = {t.params["route_lambda"]: t.value for t in complete}
        assert values == {0.0: 1.0, 0.2: 1.2}
