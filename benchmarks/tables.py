"""The samples of `benchmarks.peers` as tables: medians, ratios, rooflines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitskip.tables import table

Facts = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One runtime's samples of a test, round by round."""

    runtime: str
    samples: dict[int, float]  # round -> tokens/s
    entropy_bytes: float | None

    @property
    def median(self) -> float:
        """Tokens/s."""
        return statistics.median(self.samples.values())

    def times(self, ours: Row) -> list[float]:
        """Ours over this runtime, in each round that has both; ascending."""
        both = self.samples.keys() & ours.samples.keys()
        return sorted(ours.samples[n] / self.samples[n] for n in both)


def select(
    facts: Facts, test: str, threads: int, series: str = "peers", exit_layer: int | None = None
) -> list[Row]:
    """Rows of the runtimes that ran a test in a series (peers, exits, busy), in their order.

    exit_layer: ours, None for full depth.
    """
    rows: dict[str, Row] = {}
    for sample in facts["samples"]:
        at = sample["exit_layer"] or facts["layers"]
        wanted = (test, threads, series, exit_layer or facts["layers"])
        if (sample["test"], sample["threads"], sample["series"], at) == wanted:
            name = sample["runtime"]
            row = rows.setdefault(name, Row(name, {}, sample["entropy_bytes"]))
            row.samples[sample["round"]] = sample["tokens_per_s"]
    return list(rows.values())


def limit(facts: Facts, threads: int, name: str) -> float | None:
    """Median over all idle runs of a limit that `bitskip-cpu bench` measured, or None."""
    found = [
        values[name]
        for values in facts["limits"]
        if values["threads"] == threads and values["series"] != "busy" and values.get(name)
    ]
    return statistics.median(found) if found else None


def ours(rows: Sequence[Row]) -> Row | None:
    """bitskip's row."""
    return next((row for row in rows if row.runtime.startswith("bitskip")), None)


def with_range(values: Sequence[float], form: Callable[[float], str]) -> str:
    """median (least to most); the median alone for a single value."""
    middle = form(statistics.median(values))
    return f"{middle} ({form(min(values))} to {form(max(values))})" if len(values) > 1 else middle


def speed(value: float) -> str:
    """Tokens/s with three digits or more."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def test_table(facts: Facts, test: str, threads: Sequence[int]) -> str:
    """One test: per number of threads speed, ratio and, for decoding, the entropy roofline."""
    by_threads = {count: {r.runtime: r for r in select(facts, test, count)} for count in threads}
    names = list(dict.fromkeys(name for rows in by_threads.values() for name in rows))
    header, columns = ["runtime"], [names]

    def column(title: str, cell: Callable[[Row], str], rows: dict[str, Row]) -> None:
        header.append(title)
        columns.append([cell(rows[name]) if name in rows else "" for name in names])

    for count, rows in by_threads.items():
        mine, bandwidth = ours(list(rows.values())), limit(facts, count, "read_bytes_per_s")

        def ratio(row: Row, mine: Row | None = mine) -> str:
            times = row.times(mine) if mine and row is not mine else []
            return with_range(times, lambda value: f"{value:.2f}") if times else ""

        def roofline(row: Row, bandwidth: float | None = bandwidth) -> str:
            if not (row.entropy_bytes and bandwidth):
                return ""
            return f"{row.median * row.entropy_bytes / bandwidth:.2f}"

        thread = "thread" if count == 1 else "threads"
        column(f"{count} {thread}", lambda r: with_range([*r.samples.values()], speed), rows)
        column("bitskip, times", ratio, rows)
        if test.startswith("tg"):
            column("roofline", roofline, rows)
    return table(header, list(zip(*columns, strict=True)))


def exits_of(facts: Facts, test: str, threads: int) -> dict[int, Row]:
    """Exit layer -> our row, from the runs that measure several exits in one process."""
    layers = {s["exit_layer"] for s in facts["samples"] if s["series"] == "exits"}
    return {n: select(facts, test, threads, "exits", n)[0] for n in sorted(layers)}


def exit_table(facts: Facts, test: str, threads: Sequence[int]) -> str:
    """Ours by exit layer, and the gain over full depth."""
    header, rows = ["exit layer"], []
    by_threads = {count: exits_of(facts, test, count) for count in threads}
    for count in threads:
        header += [f"{count} thread{'s' if count > 1 else ''}", "gain %"]
    for n in by_threads[threads[0]]:
        cells: list[object] = [n]
        for count in threads:
            row, full = by_threads[count][n], by_threads[count].get(facts["layers"])
            cells.append(with_range([*row.samples.values()], speed))
            gains = [100 * (t - 1) for t in full.times(row)] if full and row is not full else []
            cells.append(with_range(gains, lambda value: f"{value:.1f}") if gains else "")
        rows.append(cells)
    return table(header, rows)


def busy_table(facts: Facts, test: str, threads: int) -> str:
    """With another process on one core, against one thread undisturbed."""
    alone = {row.runtime: row for row in select(facts, test, 1)}
    rows = []
    for row in select(facts, test, threads, "busy"):
        share = row.median / alone[row.runtime].median if row.runtime in alone else None
        cells = with_range([*row.samples.values()], speed), f"{share:.2f}" if share else ""
        rows.append((row.runtime, *cells))
    header = ("runtime", f"{threads} threads, a core busy", "of 1 thread undisturbed")
    return table(header, rows)


def markdown(facts: Facts) -> str:
    """All tables."""
    machine = facts["machine"]
    threads = sorted({s["threads"] for s in facts["samples"]})
    tests = list(dict.fromkeys(s["test"] for s in facts["samples"]))
    rounds = len({s["round"] for s in facts["samples"]})
    parts = [
        f"{facts['preset']}, {machine['cpu']}, {machine['usable_cores']} cores; {rounds} rounds"
    ]
    others = [s["others_percent"] for s in facts["samples"] if s["series"] != "busy"]
    busy = f"{statistics.median(others):.0f} % (at most {max(others):.0f} %)"
    parts.append(f"other processes before the runs: {busy} of all processors")
    for count in threads:
        read, peak = (limit(facts, count, f"{n}_per_s") for n in ("read_bytes", "multiply_adds"))
        if read:
            more = f", {peak / 1e9:.0f} G int8 multiply-adds/s" if peak else ""
            parts.append(f"limits, threads {count}: {read / 1e9:.1f} GB/s{more}")
    for test in tests:
        parts.append(f"\n{test}, tokens/s: median (least to most)\n")
        parts.append(test_table(facts, test, threads))
    for test in (name for name in tests if name.startswith("tg")):
        parts.append(f"\n{test} of bitskip by exit layer\n")
        parts.append(exit_table(facts, test, threads))
        if any(s["series"] == "busy" for s in facts["samples"]):
            parts.append(f"\n{test} while another process keeps a core busy\n")
            parts.append(busy_table(facts, test, max(threads)))
    return "\n".join(parts)
