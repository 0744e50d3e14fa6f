"""The verb `reproduce`. Only click is imported before it runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can mend become one line and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from bitskip_experiments.errors import ExperimentError
        from bitskip_ref.config import ConfigError
        from bitskip_train.errors import CheckpointError, DataError

        try:
            command(*args, **kwargs)
        except (ExperimentError, ConfigError, DataError, CheckpointError, OSError) as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return wrapped


def _seed_list(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: must be seeds, for example 0,1,2") from None


@click.command()
@click.argument("name", required=False)
@click.option(
    "--scale", type=click.Choice(["cpu", "full"]), default="cpu", show_default=True,
    help="full: the papers' configuration; cpu: a twin that finishes on two cores.",
)  # fmt: skip
@click.option("--seeds", callback=_seed_list, metavar="K,K,...", help="Default: the file's.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once. Default: all cores or GPUs.")
@click.option(
    "--nproc", type=click.IntRange(1), default=1, help="Processes of each run, under torchrun."
)
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False, exists=True),
    envvar="BITSKIP_DATA", help="Folder of the data sets ($BITSKIP_DATA); else from the hub.",
)  # fmt: skip
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/reproduce"),
    show_default=True, help="Folder for checkpoints; several commands may share it.",
)  # fmt: skip
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=Path("results"),
    show_default=True, help="Folder for figures, tables and pictures.",
)  # fmt: skip
@click.option("--storage", metavar="URL", help="Optuna's, for sweeps by several machines.")
@click.option(
    "--measure", type=click.Choice(["speed"]),
    help="speed: only the speed columns, on a quiet machine, of the first seed's trained runs.",
)  # fmt: skip
@click.option("--render", is_flag=True, help="Only draw tables and pictures from the results.")
@_one_line_errors
def reproduce(
    name: str | None, scale: str, seeds: tuple[int, ...] | None, jobs: int | None, nproc: int,
    data: Path | None, work: Path, results: Path, storage: str | None, measure: str | None,
    render: bool,
) -> None:  # fmt: skip
    """Reproduce a table or figure of the papers: train what is missing, measure, draw.

    NAME is an experiment, or `all`; without it all are listed. docs/REPRODUCE.md tells more.
    """
    from bitskip_experiments import definitions, reproduce

    if name is None:
        reproduce.list_experiments(scale, seeds, data, work, results)
        return
    chosen = definitions.names() if name == "all" else [name]
    experiments = [definitions.load(n, scale) for n in chosen]
    if measure:
        reproduce.measure_speeds(experiments, seeds, data, work, results)
        return
    if render:
        reproduce.render(experiments, seeds, results, strict=name != "all")
        return
    pool = reproduce.train(experiments, seeds, data, work, results, jobs, nproc, storage)
    if pool.stopping.is_set():
        sys.exit(130)
    reproduce.render(experiments, seeds, results, strict=name != "all" and not pool.failed)
    if pool.failed:
        raise click.ClickException(f"failed: {', '.join(pool.failed)}")
