"""Pictures of results. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.statistics import Mean, figure_mean
from bitskip_experiments.tables import Results, figure_of
from bitskip_ref.files import replace_file

COLOURS = ("#0b6e99", "#c8553d", "#5b8c3a", "#7a5195")
PAPER = "#999999"


def draw(experiment: Experiment, results: Results, path: Path) -> None:
    """Write the experiment's picture as PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8.5, 4.2))
    KINDS[experiment.plot["kind"]](figure, experiment, results)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    count = len(next(iter(results.values())))
    seeds = f"{count} seeds, mean and standard error" if count > 1 else "one seed"
    figure.suptitle(f"{experiment.title}\n{experiment.source}; ours: scale {experiment.scale}, "
                    f"{seeds}", fontsize=10)  # fmt: skip
    figure.tight_layout()
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _means(results: Results, label: str, figure: str, exits: Sequence[int | None]) -> list[Mean]:
    return [
        figure_mean(figure, [float(figure_of(r, figure, n)) for r in results[label].values()])
        for n in exits
    ]  # fmt: skip


def _column(experiment: Experiment, figure: str) -> dict[str, Any]:
    return next((c for c in experiment.columns if c.get("figure") == figure), {})


def bars(figure: Any, experiment: Experiment, results: Results) -> None:
    """A bar for each run with its seeds as dots; the paper's bars in a panel of their own."""
    path, labels = experiment.plot["figure"], [p.label for p in experiment.points]
    ours = [_means(results, label, path, [None])[0] for label in labels]
    panels = figure.subplots(1, 2)
    panels[0].bar(
        labels, [m.value for m in ours], yerr=[m.error or 0 for m in ours], capsize=4,
        color=COLOURS[: len(labels)],
    )  # fmt: skip
    for i, label in enumerate(labels):
        values = [float(figure_of(r, path)) for r in results[label].values()]
        panels[0].plot([i] * len(values), values, "k.", ms=4)
    column = _column(experiment, path)
    panels[1].bar(labels, [column["paper"][label] for label in labels], color=PAPER)
    for axes, name in zip(panels, ("ours", "paper"), strict=True):
        axes.set_title(name, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylabel(column["name"])


def depth(figure: Any, experiment: Experiment, results: Results) -> None:
    """A figure over exit layer for each run, with the paper's where it has one."""
    plot, axes = experiment.plot, figure.subplots()
    layers = experiment.points[0].model.num_hidden_layers
    exits = list(experiment.exits or range(1, layers + 1))
    for point, colour in zip(experiment.points, COLOURS, strict=False):
        found = _means(results, point.label, plot["figure"], exits)
        axes.errorbar(
            exits, [m.value for m in found], [m.error or 0 for m in found], marker="o", ms=4,
            capsize=2, color=colour, label=point.label,
        )  # fmt: skip
        paper = _paper_by_exit(experiment, point.label, exits)
        if paper:
            axes.plot(
                list(paper), list(paper.values()), "--", marker="x", ms=4, lw=1,
                color=PAPER if len(experiment.points) == 1 else colour, alpha=0.6,
                label=f"{point.label}, paper",
            )  # fmt: skip
    if "uniform" in plot:
        for size, name in ((experiment.points[0].model.vocab_size, "ours"), (50_257, "paper")):
            axes.axhline(size, ls=":", lw=1, color="#555555")
            axes.annotate(f"uniform over the vocabulary ({name})", (exits[-1], size), (0, 3),
                          textcoords="offset points", ha="right", fontsize=7)  # fmt: skip
    axes.set_yscale(plot.get("scale", "log"))
    axes.set_xticks(exits)
    axes.set_xlabel("exit layer (blocks run)" if plot.get("scale") != "linear" else "block")
    axes.set_ylabel(plot["label"])
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _paper_by_exit(experiment: Experiment, label: str, exits: Sequence[int]) -> dict[int, float]:
    """The paper's figures of one run over the exits, from whichever columns hold them."""
    found: dict[int, float] = {}
    for n in exits:
        wanted = experiment.plot["figure"].format(exit=n)
        for column in experiment.columns:
            path = column.get("figure", "")
            if path.format(exit=n) == wanted and column.get("run", label) == label:
                key = str(n) if experiment.rows == "exit" else label
                if key in column.get("paper", {}):
                    found[n] = column["paper"][key]
    return found


def sweep(figure: Any, experiment: Experiment, results: Results) -> None:
    """A figure over the grid's last parameter, a line for each value of the first, and the paper's
    in a panel of its own."""
    path, grid = experiment.plot["figure"], experiment.grid
    across = list(grid)[-1]
    lines = grid[next(iter(grid))] if len(grid) > 1 else [None]
    column = _column(experiment, path)
    panels = figure.subplots(1, 2)
    for value, colour in zip(lines, COLOURS, strict=False):
        points = [
            p for p in experiment.points
            if value is None or p.parameters[next(iter(grid))] == value
        ]  # fmt: skip
        points.sort(key=lambda p: p.parameters[across])
        x = [p.parameters[across] for p in points]
        name = None if value is None else f"{next(iter(grid))} = {value}"
        found = [_means(results, p.label, path, [None])[0] for p in points]
        panels[0].errorbar(
            x, [m.value for m in found], [m.error or 0 for m in found], marker="o", color=colour,
            capsize=3, label=name,
        )  # fmt: skip
        panels[1].plot(x, [column["paper"][p.label] for p in points], "x--", color=colour)
        if name:
            panels[0].legend(frameon=False, fontsize=8)
    for axes, name in zip(panels, ("ours", "paper"), strict=True):
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(across)
        axes.set_ylabel(column["name"])


KINDS: dict[str, Callable[[Any, Experiment, Results], None]] = {
    "bars": bars, "depth": depth, "sweep": sweep,
}  # fmt: skip
"""Word in the TOML files -> function."""
