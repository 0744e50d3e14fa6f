"""Result files: one run's figures for one experiment, as JSON that suffices to render."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.environment import commit, environment
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.runs import Run
from bitskip_ref.files import replace_file

Result = dict[str, Any]


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


def result_path(results: Path, experiment: Experiment, label: str, seed: int) -> Path:
    """Where the figures of a run lie."""
    return results / experiment.folder / f"{slug(label)}-seed{seed}.json"


def write_result(
    results: Path, experiment: Experiment, run: Run, figures: dict[str, Any], seconds: float
) -> None:
    """Write a run's figures with configuration, commit and environment."""
    about = run.about
    values = {
        "experiment": experiment.name, "scale": experiment.scale, "label": run.point.label,
        "seed": run.seed, "run": run.digest, "checkpoint": experiment.checkpoint,
        "figures": figures,
        "parameters": run.point.model.parameters(),
        "model": run.point.model.to_dict(),
        "train": run.point.train.replace(seed=run.seed).to_dict(),
        "data": run.identity["data"], "measure_tokens": experiment.tokens,
        "commit": {"trained": about.get("commit"), "measured": commit()},
        "seconds": {
            "training": about.get("seconds"),
            "training_cpu": about.get("cpu_seconds"),
            "measuring": seconds,
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
    }  # fmt: skip
    with replace_file(result_path(results, experiment, run.point.label, run.seed)) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def read_result(path: Path) -> Result:
    """Read one. Raises ExperimentError naming what is wrong and what makes it anew."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ExperimentError(
            f"{path}: no such result; run `reproduce` without --render first"
        ) from None
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path}: not a result ({error}); delete it and measure") from None
    if not isinstance(values, dict) or "figures" not in values:
        raise ExperimentError(f"{path}: not a result (no figures); delete it and measure")
    return values


def read_results(
    results: Path, experiment: Experiment, seeds: tuple[int, ...] | None
) -> dict[str, dict[int, Result]]:
    """label -> seed -> result. seeds: None takes what there is, without runs that have nothing.

    Raises ExperimentError if a seed that was asked for lacks, or everything.
    """
    found: dict[str, dict[int, Result]] = {}
    for label in experiment.labels:
        wanted = seeds or experiment.seeds
        paths = {s: result_path(results, experiment, label, s) for s in wanted}
        known = {s: read_result(path) for s, path in paths.items() if seeds or path.exists()}
        if known:
            found[label] = known
    if not found:
        read_result(result_path(results, experiment, experiment.labels[0], wanted[0]))
    if experiment.speed and (path := speed_path(results, experiment)).exists():
        speeds = json.loads(path.read_text("utf-8"))["table"]
        for label, by_seed in found.items():
            for result in by_seed.values():
                result["figures"]["speed"] = speeds.get(label, {})
    return found


def speed_path(results: Path, experiment: Experiment) -> Path:
    """Where the speeds lie that an experiment shows; they are no run's."""
    folder = experiment.folder.replace(experiment.name, experiment.speed)
    return results / folder / "speed.json"
