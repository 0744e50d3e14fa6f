"""The verb `reproduce`. Only click is imported before it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bitskip.options import COUNT, FOLDER, WHOLE, Listed, Word


def _experiments() -> list[str]:
    from bitskip_experiments import definitions

    return [*definitions.names(), "all"]


@click.command()
@click.argument("name", required=False, type=Word("experiment", _experiments))
@click.option(
    "--scale", type=click.Choice(["cpu", "full"]), default="cpu", show_default=True,
    help="full: the papers' configuration; cpu: a twin that finishes on two cores.",
)  # fmt: skip
@click.option("--seeds", type=Listed(WHOLE), metavar="K,K,...", help="Default: the file's.")
@click.option("--jobs", type=COUNT, help="Runs at once. Default: all cores or GPUs.")
@click.option("--nproc", type=COUNT, default=1, help="Processes of each run, under torchrun.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False, exists=True),
    envvar="BITSKIP_DATA", help="Folder of the data sets ($BITSKIP_DATA); else from the hub.",
)  # fmt: skip
@click.option(
    "--work", type=FOLDER, default=Path("runs/reproduce"),
    show_default=True, help="Folder for checkpoints; several commands may share it.",
)  # fmt: skip
@click.option(
    "--results", type=FOLDER, default=Path("results"),
    show_default=True, help="Folder for figures, tables and pictures.",
)  # fmt: skip
@click.option("--storage", metavar="URL", help="Optuna's, for sweeps by several machines.")
@click.option(
    "--measure", type=click.Choice(["speed"]),
    help="speed: only the speed columns, on a quiet machine, of the first seed's trained runs.",
)  # fmt: skip
@click.option("--render", is_flag=True, help="Only draw tables and pictures from the results.")
def reproduce(
    name: str | None, scale: str, seeds: list[int] | None, jobs: int | None, nproc: int,
    data: Path | None, work: Path, results: Path, storage: str | None, measure: str | None,
    render: bool,
) -> None:  # fmt: skip
    """Reproduce a table or figure of the papers: train what is missing, measure, draw.

    NAME is an experiment, or `all`; without it all are listed. docs/REPRODUCE.md tells more.
    """
    from bitskip_experiments import definitions, reproduce

    chosen_seeds = tuple(seeds) if seeds else None
    if name is None:
        reproduce.list_experiments(scale, chosen_seeds, data, work, results)
        return
    chosen = definitions.names() if name == "all" else [name]
    experiments = [definitions.load(n, scale) for n in chosen]
    reproduce.require(experiments, training=not (measure or render))
    if measure:
        reproduce.measure_speeds(experiments, chosen_seeds, data, work, results)
        return
    if render:
        reproduce.render(experiments, chosen_seeds, results, strict=name != "all")
        return
    pool = reproduce.train(experiments, chosen_seeds, data, work, results, jobs, nproc, storage)
    if pool.stopping.is_set():
        sys.exit(130)
    reproduce.render(experiments, chosen_seeds, results, strict=name != "all" and not pool.failed)
    if pool.failed:
        raise click.ClickException(f"failed: {'; '.join(pool.failed.values())}")
