"""A chart of what `benchmarks.peers` measured.

python -m benchmarks.charts NAME.json NAME.png
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.tables import Facts, Row, exits_of, ours, select

COLOURS = ("#86b6e0", "#1f5f99")  # fewest threads, most
OTHERS = ("#d0d0d0", "#8c8c8c")


def spread(row: Row) -> tuple[float, float]:
    """Distances from the median to the least and the most sample."""
    values = row.samples.values()
    return row.median - min(values), max(values) - row.median


def draw_exits(axes: Any, facts: Facts, test: str, threads: list[int]) -> None:
    """Ours over the exit layer; the two fastest other whole models as level lines."""
    for count, colour in zip(threads, COLOURS[-len(threads) :], strict=True):
        exits = exits_of(facts, test, count)
        axes.errorbar(
            list(exits), [row.median for row in exits.values()],
            list(zip(*map(spread, exits.values()), strict=True)), marker="o", color=colour,
            capsize=3, label=f"bitskip, {count} thread{'s' if count > 1 else ''}",
        )  # fmt: skip
        axes.set_xticks(list(exits))
    rows = select(facts, test, threads[-1])
    others = [row for row in rows if row.entropy_bytes and row is not ours(rows)]
    others.sort(key=lambda row: -row.median)
    for row, style, at in zip(others, ("--", ":"), (0, 0.5), strict=False):
        axes.axhline(row.median, ls=style, color="#555555", lw=1.2)
        axes.annotate(
            f"{row.runtime}, {row.median:.0f}", (at, row.median), (4, 4),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="left",
            fontsize=8, color="#333333",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"exit layer (of {facts['layers']})")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{test} by exit layer (lines: others at full depth, {threads[-1]} threads)")
    axes.legend(loc="upper right", frameon=False)


def draw_bars(axes: Any, facts: Facts, test: str, threads: list[int]) -> None:
    """All runtimes, a bar for each number of threads; lines reach from least to most."""
    by_threads = {count: {r.runtime: r for r in select(facts, test, count)} for count in threads}
    names = sorted(
        {name for rows in by_threads.values() for name in rows},
        key=lambda name: max(rows[name].median for rows in by_threads.values() if name in rows),
    )
    height = 0.8 / len(threads)
    for i, rows in enumerate(by_threads.values()):
        for y, name in enumerate(names):
            if name not in rows:
                continue
            row, mine = rows[name], name.startswith("bitskip")
            low, high = spread(row)
            at = y + (i - (len(threads) - 1) / 2) * -height
            colour = (COLOURS if mine else OTHERS)[-len(threads) :][i]
            axes.barh(
                at, row.median, height, color=colour, hatch=None if row.entropy_bytes else "///",
                edgecolor="white", xerr=[[low], [high]], ecolor="#444444", capsize=2,
            )  # fmt: skip
            axes.annotate(
                f"{row.median:.0f}", (row.median + high, at), (4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), ["\n".join(textwrap.wrap(n, 26)) for n in names], fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"tokens/s; light to dark: {', '.join(map(str, threads))} threads")
    partly = any(not row.entropy_bytes for rows in by_threads.values() for row in rows.values())
    axes.set_title(f"{test} (hatched: linear layers alone)" if partly else test)


def draw(facts: Facts, path: Path) -> None:
    """Write the picture: decoding over the exit layer, and each test against the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = sorted({s["threads"] for s in facts["samples"]})
    tests = list(dict.fromkeys(s["test"] for s in facts["samples"] if s["series"] == "peers"))
    decoding = next((name for name in tests if name.startswith("tg")), None)
    panels = ([decoding] if decoding else []) + tests
    bars = len({s["runtime"] for s in facts["samples"]})
    size = (6.2 * len(panels), max(4.2, 1.2 + 0.5 * bars))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for i, (test, where) in enumerate(zip(panels, axes[0], strict=True)):
        first = decoding is not None and i == 0
        (draw_exits if first else draw_bars)(where, facts, test, threads)
        where.spines[["top", "right"]].set_visible(False)
    machine = facts["machine"]
    rounds = len({s["round"] for s in facts["samples"]})
    figure.suptitle(
        f"{facts['preset']}, random weights; {machine['cpu']}, {machine['usable_cores']} cores; "
        f"medians of {rounds} alternating rounds, least to most",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw a result again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text("utf-8")), options.picture)


if __name__ == "__main__":
    main()
