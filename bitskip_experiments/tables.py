"""A table of ours beside the paper's figures, as Markdown and CSV. Nothing is measured here."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.derived import look_up
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.results import Result
from bitskip_experiments.statistics import Mean, contrast, figure_mean
from bitskip_experiments.units import bits_per_byte

WIDE = 0.05  # a standard error above this part of the mean: each seed's figure is shown instead

Results = dict[str, dict[int, Result]]
"""label -> seed -> result file."""


@dataclass(frozen=True)
class Row:
    """One row: its name, the results it stands for, and where the paper's figures are."""

    name: str
    key: str | int  # into a column's `paper` and `text`
    results: list[Result]
    exit_layer: int | None = None
    index: int | None = None  # of the seed, where each seed has a row


def figure_of(result: Result, path: str, exit_layer: int | None = None) -> float | str:
    """A result's figure; `{exit}` in the path is the row's exit. Raises ExperimentError."""
    try:
        return look_up(result["figures"], path.format(exit=exit_layer))
    except ExperimentError as error:
        raise ExperimentError(f"{result['label']}, seed {result['seed']}: {error}") from None


def rows_of(experiment: Experiment, results: Results) -> list[Row]:
    """The table's rows: runs, exits of the first run, or runs times seeds."""
    if experiment.rows == "exit":
        first = experiment.points[0]
        depth = first.model.num_hidden_layers
        some = [result for seeds in results.values() for result in seeds.values()]
        return [Row(f"{n}", n, some, exit_layer=n) for n in experiment.exits or range(1, depth + 1)]
    if experiment.rows == "seed":
        return [
            Row(f"{label}, seed {seed}", label, [result], index=i)
            for label, seeds in results.items()
            for i, (seed, result) in enumerate(seeds.items())
        ]
    return [Row(label, label, list(seeds.values())) for label, seeds in results.items()]


@dataclass(frozen=True)
class Cell:
    """What stands in a table: our figure, and the paper's where it has one."""

    ours: Mean | str | None
    paper: float | str | None


def cells(experiment: Experiment, rows: list[Row]) -> list[list[Cell]]:
    """For each row a cell of each column. Raises ExperimentError for a figure that lacks."""
    data = experiment.data
    found = [[_cell(column, row, data) for column in experiment.columns] for row in rows]
    for i, column in enumerate(experiment.columns):
        if order := column.get("rank"):
            values = [cell.ours.value if isinstance(cell.ours, Mean) else math.inf
                      for cell in (line[i] for line in found)]  # fmt: skip
            best = sorted(values, reverse=order == "descending")
            for line, value in zip(found, values, strict=True):
                line[i] = Cell(str(best.index(value) + 1), line[i].paper)
    return found


def _cell(column: dict[str, Any], row: Row, data: str) -> Cell:
    paper = column.get("paper", {}).get(str(row.key))
    if ppl := column.get("paper_ppl", {}).get(str(row.key)):
        paper = bits_per_byte(math.log(ppl), data)
    if isinstance(paper, list):
        paper = paper[row.index] if row.index is not None and row.index < len(paper) else None
    if "text" in column:
        return Cell(column["text"].get(row.key, ""), paper)
    wanted = column.get("run")
    chosen = [result for result in row.results if wanted in (None, result["label"])]
    try:
        values = [figure_of(result, column["figure"], row.exit_layer) for result in chosen]
    except ExperimentError:
        if column.get("optional"):
            return Cell(None, paper)
        raise
    words = sorted({value for value in values if isinstance(value, str)})
    if words:
        return Cell(" / ".join(words), paper)
    return Cell(figure_mean(column["figure"], [float(value) for value in values]), paper)


def number(value: float, form: str = "") -> str:
    """A figure as text: by its format, else three to four digits that count."""
    if form:
        return format(value, form)
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ours(cell: Cell, form: str, seeds: bool) -> str:
    """Mean and error; where the error is wide and `seeds` are what is averaged, each one's own."""
    if not isinstance(cell.ours, Mean):
        return "not measured" if cell.ours is None else cell.ours
    text = number(cell.ours.value, form)
    if not cell.ours.error:  # one seed; or the same for all: a limit reached, a speed taken once
        return text
    if seeds and "%" not in form and cell.ours.error > WIDE * abs(cell.ours.value):
        return f"{text} ({', '.join(number(v, form) for v in cell.ours.values)})"
    return f"{text} ± {number(cell.ours.error, form.removeprefix('+') or _error_form(cell.ours))}"


def _error_form(found: Mean) -> str:
    """As many digits after the point as the mean shows."""
    shown = number(found.value)
    return f".{len(shown.partition('.')[2])}f" if "e" not in shown else ".2g"


def _paper(cell: Cell, form: str) -> str:
    if cell.paper is None:
        return ""
    return cell.paper if isinstance(cell.paper, str) else number(cell.paper, form)


def _has_paper(column: dict[str, Any]) -> bool:
    return "paper" in column or "paper_ppl" in column


def _heading(experiment: Experiment) -> str:
    return {"exit": "Exit (blocks run)"}.get(experiment.rows, "Configuration")


def markdown(experiment: Experiment, results: Results, fits: Sequence[str] = ()) -> str:
    """The whole page: table, differences, fits (of `fits.tables`), notes, how it was made."""
    rows = rows_of(experiment, results)
    lines = [f"# {experiment.title}", "", f"{experiment.source}, scale `{experiment.scale}`.", ""]
    head = [_heading(experiment)]
    for column in experiment.columns:
        head += [column["name"]] + (["paper"] if _has_paper(column) else [])
    lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row, line in zip(rows, cells(experiment, rows), strict=True):
        texts = [row.name]
        for column, cell in zip(experiment.columns, line, strict=True):
            form = column.get("format", "")
            texts.append(_ours(cell, form, not experiment.measured))
            if _has_paper(column):
                texts.append(_paper(cell, form))
        lines.append("| " + " | ".join(texts) + " |")
    lines += ["", *_comparisons(experiment, results), *fits]
    lines += [f"- {note}" for note in experiment.notes]
    lines += _made(experiment, results)
    return "\n".join(lines) + "\n"


def comparison(item: dict[str, Any], results: Results) -> Mean:
    """A stated difference of a figure between runs, paired at equal seeds."""
    if missing := [x for side in ("plus", "minus") for x in item.get(side, ()) if x not in results]:
        raise ExperimentError(f"{item['name']}: {missing[0]} has no results")
    sides = [
        [
            {s: float(figure_of(r, item["figure"])) for s, r in results[label].items()}
            for label in item.get(side, ())
        ]
        for side in ("plus", "minus")
    ]
    return contrast(sides[0], sides[1])


def _comparisons(experiment: Experiment, results: Results) -> list[str]:
    if not experiment.compare:
        return []
    lines = [
        "| difference | loss, nats | 95 % interval | in PPL | bits/byte | paper, bits/byte | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for item in experiment.compare:
        try:
            found = comparison(item, results)
        except ExperimentError:
            lines.append(f"| {item['name']} | not run |  |  |  |  |  |")
            continue
        interval, verdict = "one seed", "open"
        if found.interval is not None:
            low, high = found.interval
            interval = f"{low:+.4f} to {high:+.4f}"
            verdict = "above 0" if low > 0 else "below 0" if high < 0 else "not told from 0"
        change = f"{math.expm1(found.value):+.1%}"
        paper = ""
        if "paper" in item:
            paper = f"{bits_per_byte(math.log1p(item['paper']), experiment.data):+.4f}"
        lines.append(
            f"| {item['name']} | {found.value:+.4f} | {interval} | {change} "
            f"| {_bits(item, results)} | {paper} | {verdict} |"
        )
    return [*lines, ""]


def _bits(item: dict[str, Any], results: Results) -> str:
    """The same difference in bits per byte, where the results have it."""
    figure = item["figure"].removesuffix("loss") + "bits_per_byte"
    try:
        return f"{comparison(item | {'figure': figure}, results).value:+.4f}"
    except ExperimentError:
        return ""


def _made(experiment: Experiment, results: Results) -> list[str]:
    """How it was made, in two lines, and what lacks."""
    some = [result for seeds in results.values() for result in seeds.values()]
    lacks = [label for label in experiment.labels if label not in results]
    lines = [f"- Not run yet: {'; '.join(lacks)}."] if lacks else []
    return lines + (_measured if experiment.measured else _trained)(experiment, some)


def _measured(experiment: Experiment, some: list[Result]) -> list[str]:
    """Of models that were there: pieces of text take the place of seeds."""
    tokens = {(r["label"].partition(",")[0], r["seed"]): r["tokens"] for r in some}
    commits = sorted({str(r["commit"]["measured"])[:8] for r in some})
    return [
        f"- Mean ± standard error over {len({r['seed'] for r in some})} pieces of held-out text, "
        f"{min(tokens.values()):,} tokens each. Measured at commit {', '.join(commits)}."
    ]


def _trained(experiment: Experiment, some: list[Result]) -> list[str]:
    seeds = sorted({result["seed"] for result in some})
    steps = sorted({r["train"]["steps"] for r in some})
    train, model = some[0]["train"], some[0]["model"]
    per_step = train["batch"] * train["accumulation"] * train["context"]
    seconds = [r["seconds"].get("training_cpu") or r["seconds"]["training"] or 0 for r in some]
    commits = sorted({str(r["commit"]["trained"])[:8] for r in some})
    tokens = f"the first {experiment.tokens:,} tokens" if experiment.tokens else "all tokens"
    size = f"{model['num_hidden_layers']} layers, hidden size {model['hidden_size']}"
    seed_word = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    error = "One seed: no error bars. "
    if len(seeds) > 1:
        error = "Mean (of perplexities geometric) ± standard error over seeds; where that is above "
        error += f"{WIDE:.0%}, each seed's figure in brackets. "
    return [
        f"- {error}{size}, vocabulary {model['vocab_size']:,}, context {train['context']}; at most "
        f"{' or '.join(f'{s:,}' for s in steps)} steps of {per_step:,} tokens; {seed_word}.",
        f"- Held-out figures: {tokens}, windows of {train['context']} without overlap; weights of "
        f"`{experiment.checkpoint}.pt`. Trained at commit {', '.join(commits)}; "
        f"{sum(seconds) / 60:.0f} minutes of processor time in all.",
    ]


def csv_text(experiment: Experiment, results: Results) -> str:
    """The table in full precision: mean, standard error, count of seeds and paper's per column."""
    rows = rows_of(experiment, results)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = [_heading(experiment)]
    for column in experiment.columns:
        head += [f"{column['name']}{part}" for part in ("", " (se)", " (seeds)", " (paper)")]
    writer.writerow(head)
    for row, line in zip(rows, cells(experiment, rows), strict=True):
        values: list[Any] = [row.name]
        for cell in line:
            ours = cell.ours
            if isinstance(ours, Mean):
                values += [ours.value, ours.error, ours.count, cell.paper]
            else:
                values += [ours, None, None, cell.paper]
        writer.writerow(values)
    return buffer.getvalue()
