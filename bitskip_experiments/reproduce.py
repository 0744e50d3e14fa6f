"""What `reproduce` does: train, measure, render; and the list of experiments."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from bitskip_experiments.definitions import Experiment, load, names
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.pool import Pool, stopping_on_signals
from bitskip_experiments.results import (
    Result,
    read_result,
    read_results,
    result_path,
    write_result,
)
from bitskip_experiments.runs import Run, runs_of
from bitskip_experiments.showing import Progress
from bitskip_experiments.sweep import sweep
from bitskip_ref.files import replace_file


def train(
    experiments: list[Experiment], seeds: tuple[int, ...] | None, data: Path | None, work: Path,
    results: Path, jobs: int | None, processes: int, storage: str | None,
) -> Pool:  # fmt: skip
    """Train and measure all runs that lack, seed by seed.

    The pool tells what failed and whether it was stopped.
    """
    console = Console(stderr=True)
    everything = _by_seed(experiments, seeds, data, work)
    gpus = _gpus()
    pool = Pool(jobs or _jobs(experiments, gpus, processes), processes, gpus, console.print)
    pool.measure = Measuring(everything, results).measure
    runs = {run.digest: run for _, _, found in everything for run in found}
    with (
        stopping_on_signals(pool),
        Progress(console, list(runs.values()), pool),
        ThreadPoolExecutor(1) as threads,
    ):
        training = threads.submit(_train, everything, pool, storage, work)
        while not wait([training], timeout=0.5).done:
            pass  # Python sees to signals here, whichever thread the system gave them to
        training.result()
    for experiment in experiments:
        if experiment.measured and not pool.stopping.is_set():
            module = importlib.import_module(f"bitskip_experiments.{experiment.measured}")
            module.measure(experiment, data, work, results)
    if pool.stopping.is_set():
        console.print("stopped; the same command goes on")
    return pool


def require(experiments: list[Experiment], training: bool) -> None:
    """Import what is needed only after hours, for pictures and sweeps. Raises ImportError."""
    if any(e.plot for e in experiments):
        importlib.import_module("matplotlib")
    if training and any(e.grid for e in experiments):
        importlib.import_module("optuna")


SPEED_ROUNDS = 3

Needs = list[tuple[int, Experiment, list[Run]]]
"""(index of the seed, experiment, its runs of that seed)."""


class Measuring:
    """Measures a trained run for every experiment that needs it, each figure once."""

    def __init__(self, needs: Needs, results: Path) -> None:
        self.results = results
        self.needs: dict[str, list[tuple[Experiment, Run]]] = {}
        for _, experiment, runs in needs:
            for run in runs:
                self.needs.setdefault(run.digest, []).append((experiment, run))

    def measure(self, run: Run) -> None:
        """Write the result files of a run that are missing or of another run."""
        import torch

        from bitskip_experiments.measures import MEASURES, Figures, Subject

        torch.set_num_threads(run.point.train.threads or torch.get_num_threads())
        known: dict[tuple[object, ...], Figures] = {}
        for experiment, named in self.needs[run.digest]:
            path = result_path(self.results, experiment, named.point.label, named.seed)
            if path.exists() and _is_of(read_result(path), experiment, named):
                continue
            subject, started = Subject(named, experiment), time.monotonic()
            figures: Figures = {}
            for name in experiment.measures:
                key = (name, experiment.checkpoint, experiment.exits, experiment.tokens)
                if key not in known:
                    known[key] = MEASURES[name](subject)
                figures[name] = known[key]
            write_result(self.results, experiment, named, figures, time.monotonic() - started)


def _is_of(result: Result, experiment: Experiment, run: Run) -> bool:
    """Whether a result is of this run and has all that the experiment wants of it."""
    settings = {
        "run": run.digest, "checkpoint": experiment.checkpoint, "measure_tokens": experiment.tokens
    }  # fmt: skip
    same = all(result.get(name) == value for name, value in settings.items())
    return same and set(experiment.measures) <= set(result["figures"])


def _by_seed(
    experiments: list[Experiment], seeds: tuple[int, ...] | None, data: Path | None, work: Path
) -> Needs:
    """The first seed of all experiments, then the second, and so on."""
    found = []
    for experiment in experiments:
        for i, seed in enumerate(seeds or experiment.seeds):
            found.append((i, experiment, runs_of(experiment.points, (seed,), data, work)))
    return sorted(found, key=lambda item: item[0])


def _train(everything: Needs, pool: Pool, storage: str | None, work: Path) -> None:
    """Plain runs of a seed share the pool; then its sweeps."""
    for index in sorted({i for i, _, _ in everything}):
        here = [(e, runs) for i, e, runs in everything if i == index]
        pool.train_all([run for e, runs in here if not e.grid for run in runs])
        for experiment, runs in here:
            if experiment.grid and not pool.stopping.is_set():
                sweep(experiment, runs, pool, storage, work)


def measure_speeds(
    experiments: list[Experiment], seeds: tuple[int, ...] | None, data: Path | None, work: Path,
    results: Path,
) -> None:  # fmt: skip
    """Measure what the experiments' speed columns need. Raises ExperimentError if none has any."""
    from bitskip_cpu.cores import usable_cores
    from bitskip_experiments.speed import measure_speed

    wanted = {e.speed: e for e in experiments if e.speed}
    if not wanted:
        raise ExperimentError(f"{experiments[0].name}: has no speed columns; v1-table4 has")
    for experiment in wanted.values():
        runs = runs_of(experiment.points, (seeds or experiment.seeds)[:1], data, work)
        say = Console(stderr=True).print
        measure_speed(experiment, runs, results, usable_cores(), SPEED_ROUNDS, say)


def render(
    experiments: list[Experiment], seeds: tuple[int, ...] | None, results: Path, strict: bool
) -> None:
    """Write table.md, table.csv and plot.png of each experiment from its result files.

    strict: raise ExperimentError where results lack; else say so and go on.
    """
    from bitskip_experiments import claims, fits, plots, tables

    for experiment in experiments:
        folder = results / experiment.folder
        try:
            found = read_results(results, experiment, seeds)
        except ExperimentError as error:
            if strict:
                raise
            Console(stderr=True).print(
                f"{experiment.name}: {error}", highlight=False, soft_wrap=True, markup=False
            )
            continue
        texts = {
            "table.md": tables.markdown(experiment, found, fits.tables(experiment, results)),
            "table.csv": tables.csv_text(experiment, found),
        }
        for name, text in texts.items():
            with replace_file(folder / name) as file:
                file.write(text.encode())
        whole = len(found) == len(experiment.labels)
        if experiment.plot and (whole or experiment.plot["kind"] in plots.PARTIAL):
            plots.draw(experiment, found, folder / "plot.png")
        print(f"{folder / 'table.md'}")
    if len(experiments) == len(names()):
        with replace_file(results / "claims.md") as file:
            file.write(claims.page(results).encode())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _jobs(experiments: list[Experiment], gpus: int, processes: int) -> int:
    """As many runs as GPUs, or as cores divided by what one run uses."""
    threads = max((p.train.threads or 1 for e in experiments for p in e.points), default=1)
    if gpus:
        return max(1, gpus // processes)
    from bitskip_cpu.cores import usable_cores

    return max(1, usable_cores() // (threads * processes))


def list_experiments(
    scale: str, seeds: tuple[int, ...] | None, data: Path | None, work: Path, results: Path
) -> None:
    """All experiments with how many of their runs are trained, and how many are measured."""
    from rich.table import Table

    table = Table("experiment", "what", "source", "trained", "measured")
    for name in names():
        experiment = load(name, scale)
        runs = runs_of(experiment.points, seeds or experiment.seeds, data, work)
        trained = f"{sum(run.trained for run in runs)} of {len(runs)}" if runs else "-"
        wanted = list(itertools.product(experiment.labels, seeds or experiment.seeds))
        measured = sum(result_path(results, experiment, *which).exists() for which in wanted)
        table.add_row(
            name, experiment.title, experiment.source, trained, f"{measured} of {len(wanted)}"
        )
    Console(width=None if os.isatty(1) else 120).print(table)
