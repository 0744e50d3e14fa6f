"""The picture of `exits`: loss against depth, and against speed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitskip_cpu.heldout.points import Point
from bitskip_ref.files import replace_file

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's colours, which the colour-blind can tell apart; each kind has its own marker too,
# and its own side for what is written at a point: (points to the right, up).
STYLES = {
    "fixed": ("#000000", "o", (-4, -9)), "gate": ("#D55E00", "D", (-5, -9)),
    "max": ("#0072B2", "s", (5, 3)), "margin": ("#CC79A7", "v", (5, -9)),
    "entropy": ("#009E73", "^", (-5, 4)),
}  # fmt: skip


def check(path: Path) -> None:
    """Raise ValueError or ImportError if no such picture can be drawn."""
    if path.suffix[1:] not in FORMATS:
        raise ValueError(f"{path}: a picture ends in {', '.join('.' + f for f in FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: no such folder")
    import matplotlib  # noqa: F401


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Write the picture, whole or not at all; its format is the suffix's."""
    import matplotlib
    from matplotlib.figure import Figure

    deepest = max(points, key=lambda p: p.found.mean_depth)
    rise = {id(p): 100 * (p.found.losses.ppl / deepest.found.losses.ppl - 1) for p in points}
    depth = {id(p): p.found.mean_depth for p in points}
    speed = {id(p): p.found.tokens_per_s or 1.0 for p in points}
    with matplotlib.rc_context({"svg.hashsalt": "bitskip", "font.size": 9}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for kind, group in _kinds(points).items():
            _series(left, kind, group, depth, rise, thresholds=True)
            _series(right, kind, group, speed, rise, thresholds=False)
        best = [id(p) for p in points if p.pareto]
        right.plot(
            [speed[k] for k in best], [rise[k] for k in best], linestyle="none", marker="o",
            markersize=10, fillstyle="none", color="#E69F00", markeredgewidth=1.5,
            label="nothing is faster and better", zorder=4,
        )  # fmt: skip
        left.set(
            xlabel="mean depth (blocks a token)",
            ylabel=f"perplexity above that of {deepest.label} (%)",
        )
        right.set(xlabel="decoding (tokens/s)", xscale="log")
        _ticks(left, right)
        left.set_ylim(min(rise.values()) - 0.3, 1.5 * max(1.0, *rise.values()))
        left.legend(*right.get_legend_handles_labels(), loc="lower left", frameon=False)
        figure.suptitle(title, fontsize=10)
        with replace_file(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=_metadata(path))


def _kinds(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Name in `STYLES` -> its points in order of depth."""
    kinds: dict[str, list[Point]] = {}
    for p in sorted(points, key=lambda p: p.found.mean_depth):
        kinds.setdefault(p.kind if isinstance(p.kind, str) else "fixed", []).append(p)
    return kinds


def _series(
    axes: Any, kind: str, group: Sequence[Point], x: dict[int, float], y: dict[int, float],
    thresholds: bool,
) -> None:  # fmt: skip
    """One kind's points, joined, with some exit layers, or thresholds, beside them."""
    colour, marker, (aside, up) = STYLES[kind]
    aside = aside if thresholds else -aside  # the curve falls in one panel, rises in the other
    places = [(x[id(p)], y[id(p)]) for p in group]
    axes.plot(*zip(*places, strict=True), color=colour, marker=marker, markersize=4, linewidth=1,
              label=kind)  # fmt: skip
    every = 1 + len(group) // 13
    for p, place in list(zip(group, places, strict=True))[::-1][::every]:
        if kind == "fixed" or thresholds:
            axes.annotate(
                str(p.kind) if kind == "fixed" else f"{p.threshold:g}", place, color=colour,
                fontsize=7, xytext=(aside, up), textcoords="offset points",
                ha="right" if aside < 0 else "left",
            )  # fmt: skip


def _ticks(left: Any, right: Any) -> None:
    """Logarithmic above 1 % and even below, so that what matters has the room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    left.set_yscale("symlog", linthresh=1.0, subs=[2, 3, 4, 5, 6, 7, 8, 9])
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _metadata(path: Path) -> dict[str, None]:
    """No date in the file: the same figures give the same bytes."""
    return {"Date": None} if path.suffix == ".svg" else {}
