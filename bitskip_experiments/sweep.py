"""Sweeps over a grid by Optuna, whose storage several machines may share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.pool import Pool
from bitskip_experiments.runs import Run

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
        return _final_loss(run)

    left = len(runs) - len(_complete(study, grid))
    if left > 0:
        study.optimize(objective, n_trials=left, n_jobs=pool.jobs)
    # What Optuna calls visited but is not: points that failed, or were stopped, in an older sweep.
    pool.train_all(runs)
    choices: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(values) for name, values in grid.items()
    }
    for point, run in by_point.items():
        if run.trained and point not in _complete(study, grid):
            parameters = dict(zip(grid, point, strict=True))
            study.add_trial(
                optuna.trial.create_trial(
                    params=parameters, distributions=choices, value=_final_loss(run)
                )
            )


def _complete(study: optuna.Study, grid: dict[str, list[Any]]) -> set[tuple[Any, ...]]:
    """The points whose value the study knows."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {tuple(trial.params[name] for name in grid) for trial in trials}


def _final_loss(run: Run) -> float:
    """The last validation loss of a trained run."""
    return float([e["valid_loss"] for e in run.history() if "valid_loss" in e][-1])


def _study_name(experiment: Experiment, runs: list[Run]) -> str:
    """One study for each table, seed and set of runs: a changed configuration is another study."""
    digests = "".join(sorted(run.digest for run in runs))
    return f"{experiment.folder}-{hashlib.sha256(digests.encode()).hexdigest()[:8]}"


def _journal(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))
