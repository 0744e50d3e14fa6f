"""Sweeps over a grid by Optuna, whose storage several machines may share."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.definitions import Experiment
from experiments.errors import ExperimentError
from experiments.pool import Pool
from experiments.runs import Run

if TYPE_CHECKING:
    import optuna


def sweep(
    experiment: Experiment, runs: list[Run], pool: Pool, storage: str | None, work: Path
) -> None:
    """Train the runs of one seed; Optuna says which process takes which point of the grid.

    A trial's value is the final validation loss. A point whose run is trained already, by another
    table perhaps, is told at once. storage: a URL (`sqlite:///...`, `mysql://...`), or None for a
    journal below `work`. Raises ExperimentError for a storage that cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    grid = experiment.grid
    by_point = {tuple(run.point.parameters[name] for name in grid): run for run in runs}
    try:
        study = optuna.create_study(
            study_name=_study_name(experiment, runs),
            storage=storage or _journal(work / "optuna.journal"),
            sampler=optuna.samplers.GridSampler(grid, seed=0), load_if_exists=True,
        )  # fmt: skip
    except Exception as error:  # a driver's own types
        raise ExperimentError(f"--storage {storage}: {error}") from None

    def objective(trial: optuna.Trial) -> float:
        point = tuple(trial.suggest_categorical(name, values) for name, values in grid.items())
        run = by_point[point]
        if not pool.train(run):
            if pool.stopping.is_set():
                trial.study.stop()
            raise optuna.TrialPruned
        return [e["valid_loss"] for e in run.history() if "valid_loss" in e][-1]

    done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    left = math.prod(len(values) for values in grid.values()) - done
    if left > 0:
        study.optimize(objective, n_trials=left, n_jobs=pool.jobs)
    # Points of trials that another machine, or an older sweep, has told but that lie elsewhere.
    pool.train_all(runs)


def _study_name(experiment: Experiment, runs: list[Run]) -> str:
    """One study for each table, seed and set of runs: a changed configuration is another study."""
    digests = "".join(sorted(run.digest for run in runs))
    return f"{experiment.folder}-{hashlib.sha256(digests.encode()).hexdigest()[:8]}"


def _journal(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))
