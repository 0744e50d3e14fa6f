"""Pictures of results. matplotlib is imported when one is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.statistics import Mean, figure_mean, mean
from bitskip_experiments.tables import Results, figure_of
from bitskip_ref.files import replace_file

LEVELS = np.geomspace(0.25, 64, 33)
"""Multiples of a token's root mean square, at which `rotation` counts the tails of its values."""

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
    error = experiment.plot.get("error", "standard error")
    seeds = f"{count} seeds, mean and {error}" if count > 1 else "one seed"
    how = f"ours: scale {experiment.scale}, {seeds}"
    if experiment.measured:
        how = f"{count} pieces of held-out text, mean and standard error"
    figure.suptitle(f"{experiment.title}\n{experiment.source}; {how}", fontsize=10)
    figure.tight_layout()
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _means(results: Results, label: str, figure: str, exits: Sequence[int | None]) -> list[Mean]:
    """A figure of a run at some exits; nan, which is not drawn, of a run that has no result."""
    if label not in results:
        return [Mean(math.nan, None, (math.nan,)) for _ in exits]
    return [
        figure_mean(figure, [float(figure_of(r, figure, n)) for r in results[label].values()])
        for n in exits
    ]  # fmt: skip


def _column(experiment: Experiment, figure: str) -> dict[str, Any]:
    return next((c for c in experiment.columns if c.get("figure") == figure), {})


def bars(figure: Any, experiment: Experiment, results: Results) -> None:
    """A bar for each run with its seeds as dots; the paper's bars in a panel of their own."""
    path, labels = experiment.plot["figure"], experiment.labels
    ours = [_means(results, label, path, [None])[0] for label in labels]
    panels = figure.subplots(1, 2)
    panels[0].bar(
        labels, [m.value for m in ours], yerr=[m.error or 0 for m in ours], capsize=4,
        color=COLOURS[: len(labels)],
    )  # fmt: skip
    for i, label in enumerate(labels):
        values = [float(figure_of(r, path)) for r in results.get(label, {}).values()]
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


def tails(figure: Any, experiment: Experiment, results: Results) -> None:
    """How what enters q, k, v and down is spread, before and after a rotation; what 4 bits cost."""
    figure.set_size_inches(10.5, 8.4)
    order = "Hartley x Hadamard"
    models = list(dict.fromkeys(label.split(", ")[0] for label in experiment.labels))
    orders = list(dict.fromkeys(label.split(", ")[1] for label in experiment.labels))
    (before_qkv, before_down), (depths, cost) = figure.subplots(2, 2)
    for i, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
        for name, style in (("none", "-"), (order, "--")):
            label = model if name == "none" else f"{model}, rotated"
            for group, axes in (("qkv", before_qkv), ("down", before_down)):
                found = results.get(f"{model}, {name}", {}).values()
                if not found:
                    continue
                inputs = [r["figures"]["inputs"][group] for r in found]
                tail = np.mean([f["tail"] for f in inputs], 0)
                axes.plot(LEVELS[tail > 0], tail[tail > 0], style, color=colour, label=label)
                if group == "qkv":
                    layers = np.exp(np.mean([f["layers"] for f in inputs], 0))
                    share = (np.arange(len(layers)) + 0.5) / len(layers)
                    depths.plot(share, layers, style, color=colour)
        means = [_means(results, f"{model}, {o}", "cost.4", [None])[0] for o in orders]
        cost.errorbar(
            np.arange(len(orders)) + 0.12 * (i - 1), [m.value for m in means],
            [m.error or 0 for m in means], fmt="o", ms=5, capsize=3, color=colour, label=model,
        )  # fmt: skip
    for what, axes in (("q, k, v", before_qkv), ("down", before_down)):
        normal = [math.erfc(x / math.sqrt(2)) for x in LEVELS]
        axes.plot(LEVELS, normal, ":", color="#555555", label="normal values")
        axes.set(xscale="log", yscale="log", ylim=(1e-6, 1), ylabel="share of values beyond",
                 xlabel="multiples of a token's rms", title=f"before {what}")  # fmt: skip
    before_qkv.legend(frameon=False, fontsize=7, loc="lower left")
    depths.axhline(3, ls=":", color="#555555")
    depths.set(yscale="log", xlabel="depth (share of the blocks)",
               ylabel="kurtosis before q, k, v", title="by depth")  # fmt: skip
    cost.set(
        yscale="log", ylabel="cost of 4-bit activations, bits a byte", title="what 4 bits cost"
    )
    cost.set_xticks(range(len(orders)), orders, rotation=20, ha="right", fontsize=8)
    cost.legend(frameon=False, fontsize=8)


def gain(figure: Any, experiment: Experiment, results: Results) -> None:
    """What a change is worth, best so far, over the epochs seen, a line for each pair of runs; and
    what the last block gains over the exit before it, if that is asked for, too. Bands are 95 %
    intervals over seeds. Gains below a tenth are drawn to scale, larger ones by their logarithms.
    """
    plot = experiment.plot
    cliffs = plot.get("cliffs", [])
    figure.set_size_inches(11.5 if cliffs else 7.5, 5.4)
    panels = figure.subplots(1, 2 if cliffs else 1, squeeze=False)[0]
    left = panels[0]
    left.axvspan(*plot["epochs"], color="#eeeeee", label="the paper's best, of WikiText-2 whole")
    left.axhline(plot["paper"], ls="--", color=PAPER, label="the paper's gain")
    left.axhline(0, lw=0.8, color="#555555")
    for pair in plot["pairs"]:
        plus, minus = (_curves(results, pair[side], True) for side in ("plus", "minus"))
        both = {s: (plus[s], minus[s]) for s in plus if s in minus}
        _band(left, both, pair["name"], COLOURS[pair["colour"]], pair["line"])
    left.set(xscale="log", xlabel="epochs seen", ylabel="Hadamard less baseline, bits a byte")
    left.set_yscale("symlog", linthresh=0.1, subs=[3])
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:.1g}")
    if cliffs:
        _draw_cliffs(panels[1], cliffs, results)
    for axes in panels:
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))


def _draw_cliffs(axes: Any, cliffs: list[dict[str, str]], results: Results) -> None:
    for cliff, colour in zip(cliffs, COLOURS, strict=False):
        if cliff["run"] not in results:
            continue
        last = _curves(results, cliff["run"], False)
        before = _curves(results, cliff["run"], False, str(_layers(results, cliff["run"]) - 1))
        _band(axes, {s: (before[s], last[s]) for s in last}, cliff["name"], colour, "-")
    axes.set(xscale="log", xlabel="epochs seen", ylabel="last exit but one less last, bits a byte")


Curve = dict[float, float]
"""Epochs seen -> bits a byte."""


def _layers(results: Results, label: str) -> int:
    return int(next(iter(results[label].values()))["model"]["num_hidden_layers"])


def _curves(results: Results, label: str, best: bool, exit_layer: str = "") -> dict[int, Curve]:
    """Validation over training at each seed; best: the least so far. Empty if it was not run."""
    found: dict[int, Curve] = {}
    for seed, result in results.get(label, {}).items():
        training, train = result["figures"]["training"], result["train"]
        exits = result["figures"]["exits"][str(_layers(results, label))]
        bits = exits["bits_per_byte"] / exits["loss"]
        losses = [loss for _, loss in training["curve"]]
        if exit_layer:
            losses = training["exit_curves"][exit_layer]
        if best:
            losses = list(itertools.accumulate(losses, min))
        epoch = training["train_tokens"] / (
            train["batch"] * train["accumulation"] * train["context"]
        )
        steps = [step for step, _ in training["curve"]]
        found[seed] = {step / epoch: loss * bits for step, loss in zip(steps, losses, strict=True)}
    return found


def _band(
    axes: Any, pairs: dict[int, tuple[Curve, Curve]], name: str, colour: str, style: str
) -> None:
    """Mean difference and its interval over seeds; a run that ended keeps its last figure."""
    if not pairs:
        return
    epochs = sorted({e for pair in pairs.values() for curve in pair for e in curve})

    def at(curve: Curve, epoch: float) -> float:
        return curve[max((e for e in curve if e <= epoch), default=min(curve))]

    means = [mean([at(a, e) - at(b, e) for a, b in pairs.values()]) for e in epochs]
    axes.plot(epochs, [m.value for m in means], style, color=colour, label=name)
    ends = [m.interval or (m.value, m.value) for m in means]
    axes.fill_between(epochs, *zip(*ends, strict=True), color=colour, alpha=0.15, lw=0)


KINDS: dict[str, Callable[[Any, Experiment, Results], None]] = {
    "bars": bars, "depth": depth, "sweep": sweep, "tails": tails, "gain": gain,
}  # fmt: skip
"""Word in the TOML files -> function."""
PARTIAL = {"gain"}
"""Kinds that draw what there is; the others want all runs."""
