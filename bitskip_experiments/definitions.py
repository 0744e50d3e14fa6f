"""Experiments as TOML files: what is trained, what is measured, how it is shown.

`NAME.toml` is an experiment, `groups/*.toml` are runs that several experiments share, `scales.toml`
makes the scaled twin. docs/REPRODUCE.md describes the keys.
"""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitskip_experiments.corpora import Corpus
from bitskip_experiments.errors import ExperimentError
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.documents import read_text
from bitskip_ref.words import unknown
from bitskip_train.recipes import apply, recipe
from bitskip_train.settings import TrainConfig

HERE = Path(__file__).parent
SCALES = ("cpu", "full")
_EXPERIMENT = {
    "title", "source", "group", "runs", "grid", "seeds", "checkpoint", "measures", "exits", "rows",
    "columns", "compare", "plot", "notes", "speed", "claims", "fits", "measured", "labels", "data",
}  # fmt: skip
_COLUMN = {"name", "figure", "format", "paper", "paper_ppl", "text", "rank", "run", "optional"}
_GROUP = {"data", "scales", "preset", "model", "train", "runs"}


@dataclass(frozen=True)
class Point:
    """One run but for its seed: a label and the settings it trains with."""

    label: str
    data: str  # wikitext-2 or tinystories
    model: ModelConfig
    train: TrainConfig
    parameters: dict[str, Any] = field(default_factory=dict)  # of a sweep: what was varied


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper at one scale."""

    name: str
    scale: str
    title: str
    source: str
    points: list[Point]  # what is trained; none where `measured` names a module
    labels: list[str]  # of the points, or of what is measured without training
    data: str  # wikitext-2 or tinystories: whose bytes a token are the paper's units
    measured: str  # the module of this package whose `measure` makes the results; empty: trained
    seeds: tuple[int, ...]
    checkpoint: str  # best or last: which file of a run is measured
    measures: tuple[str, ...]
    exits: tuple[int, ...]  # that `exits` measures; none: all
    tokens: int  # of held-out text that measures read; 0: all
    rows: str  # run, exit or seed: what a row of the table is
    columns: list[dict[str, Any]]
    compare: list[dict[str, Any]]  # pairs of runs whose difference is stated
    grid: dict[str, list[Any]]  # of a sweep: parameter -> values
    claims: list[dict[str, Any]]  # what the runs decide, and by which rule (`claims.py`)
    fits: list[dict[str, Any]]  # tables of the papers, and the readings laid beside them
    plot: dict[str, Any]
    notes: list[str]
    speed: str  # the experiment whose folder holds speed.json; empty: no speeds

    @property
    def folder(self) -> str:
        """Where its results lie, below the results folder."""
        return self.name if self.scale == "cpu" else f"{self.name}-{self.scale}"

    def point(self, label: str) -> Point:
        """The run of that label. Raises ExperimentError."""
        for point in self.points:
            if point.label == label:
                return point
        known = ", ".join(p.label for p in self.points)
        raise ExperimentError(f"{self.name}: no run is called {label!r}; known: {known}")


def names() -> list[str]:
    """All experiments, in the order of the papers."""
    found = [path.stem for path in HERE.glob("*.toml") if path.stem != "scales"]
    return sorted(found, key=lambda name: (name.split("-")[0], "table" not in name, name))


def load(name: str, scale: str) -> Experiment:
    """Read and check one experiment. Raises ExperimentError naming file, key and remedy."""
    if name not in names():
        raise ExperimentError(unknown("experiment", name, names()))
    if scale not in SCALES:
        raise ExperimentError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    path = HERE / f"{name}.toml"
    values = _read(path, _EXPERIMENT)
    own = ("measured", "labels", "data") if "measured" in values else ("group", "measures")
    for key in ("title", "source", *own, "seeds", "columns"):
        if key not in values:
            raise ExperimentError(f"{path.name}: lacks the key {key!r}")
    for column in values["columns"]:
        if extra := sorted(set(column) - _COLUMN):
            raise ExperimentError(
                f"{path.name}: column {column.get('name')!r}: unknown key {extra[0]!r}; "
                f"known: {', '.join(sorted(_COLUMN))}"
            )
    try:
        points = [] if "measured" in values else _points(values, scale)
    except ConfigError as error:
        raise ExperimentError(f"{path.name}: {error}") from None
    scales = _read(HERE / "scales.toml")
    return Experiment(
        name=name, scale=scale, title=values["title"], source=values["source"], points=points,
        labels=values.get("labels", [point.label for point in points]),
        data=Corpus(values.get("data") or points[0].data, None).whole,
        measured=values.get("measured", ""),
        seeds=tuple(values["seeds"][scale]), checkpoint=values.get("checkpoint", "best"),
        measures=tuple(values.get("measures", ())), exits=tuple(values.get("exits", ())),
        tokens=scales[scale].get("measure_tokens", 0), rows=values.get("rows", "run"),
        columns=values["columns"], compare=values.get("compare", []),
        claims=values.get("claims", []), fits=values.get("fits", []),
        grid=values.get("grid", {}).get("values", {}), plot=values.get("plot", {}),
        notes=values.get("notes", []), speed=values.get("speed", ""),
    )  # fmt: skip


def _points(values: dict[str, Any], scale: str) -> list[Point]:
    """The experiment's runs: its group's, or those of its grid over the group's settings."""
    path = HERE / "groups" / f"{values['group']}.toml"
    group = _read(path, _GROUP)
    if grid := values.get("grid"):
        runs = {}
        for combination in itertools.product(*grid["values"].values()):
            parameters = dict(zip(grid["values"], combination, strict=True))
            train = grid.get("train", {}) | parameters
            runs[grid["label"].format(**parameters)] = {
                "train": train, "parameters": parameters, "scales": grid.get("scales", []),
            }  # fmt: skip
    else:
        runs = group["runs"]
    labels = values.get("runs", list(runs))
    if missing := [label for label in labels if label not in runs]:
        raise ExperimentError(f"{path.name}: has no run {missing[0]!r}; known: {', '.join(runs)}")
    return [_point(label, group, runs[label], scale) for label in labels]


def _point(label: str, group: dict[str, Any], run: dict[str, Any], scale: str) -> Point:
    """Preset, then the group's settings, then the run's, then the scale's."""
    settings = recipe(run.get("preset", group.get("preset", "")))
    for changes in (group, run):
        settings = apply(settings, changes)
    for part in [*group.get("scales", ()), *run.get("scales", ())]:
        changes = _read(HERE / "scales.toml")[scale].get(part, {})
        factors = changes.get("times", {})
        scaled = {name: getattr(settings[1], name) * factor for name, factor in factors.items()}
        settings = apply(settings, {"train": {n: _whole(v) for n, v in scaled.items()}})
        settings = apply(settings, changes)
    return Point(label, group["data"], *settings, run.get("parameters", {}))


def _whole(value: float) -> float | int:
    """A step count as the integer it is, after it was multiplied; rates lose binary noise."""
    return round(value) if value >= 1 else float(f"{value:.9g}")


def _read(path: Path, known: set[str] | None = None) -> dict[str, Any]:
    """A TOML file. Raises ExperimentError if it is none, or has a key that is not known."""
    try:
        values = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(f"{path.name}: cannot be read as TOML ({error})") from None
    if known is not None and (extra := sorted(set(values) - known)):
        keys = ", ".join(sorted(known))
        raise ExperimentError(f"{path.name}: unknown key {extra[0]!r}; known: {keys}")
    return values
