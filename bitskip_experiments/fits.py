"""Which reading of a paper fits which of its tables, by one number.

A cell's place is ln(perplexity) / ln(vocabulary): 0 for certainty, 1 for a uniform guess, whatever
the vocabulary. The distance of a reading is the mean over the table's cells of how far its places
are from the paper's, at each seed; up to the `limit` of the TOML it fits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bitskip_experiments.definitions import Experiment, load
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.results import Result, read_results
from bitskip_experiments.statistics import Mean, mean
from bitskip_experiments.tables import figure_of

GPT2_WORDS = 50_257


def distances(
    cells: dict[str, dict[str, float]], found: dict[str, Result], measure: str
) -> tuple[float, float]:
    """Mean distance of the places, and of the losses in nats, over all cells, for one seed.

    cells: model -> exit -> the paper's perplexity; found: model -> result.
    """
    places, nats = [], []
    for name, exits in cells.items():
        words = math.log(found[name]["model"]["vocab_size"])
        for n, ppl in exits.items():
            loss = float(figure_of(found[name], f"{measure}.{n}.loss"))
            places.append(abs(loss / words - math.log(ppl) / math.log(GPT2_WORDS)))
            nats.append(abs(loss - math.log(ppl)))
    return sum(places) / len(places), sum(nats) / len(nats)


def reading(
    fit: dict[str, Any], item: dict[str, Any], experiment: Experiment, results: Path
) -> tuple[Mean, Mean] | None:
    """Distances of one reading over the seeds that all its models have; None if runs lack."""
    source = load(item.get("experiment", experiment.name), experiment.scale)
    try:
        known = read_results(results, source, None)
    except ExperimentError:
        return None
    labels = item["runs"]
    if any(label not in known for label in labels.values()):
        return None
    seeds = set.intersection(*(set(known[label]) for label in labels.values()))
    by_seed = [{name: known[label][s] for name, label in labels.items()} for s in sorted(seeds)]
    if not by_seed:
        return None
    pairs = [distances(fit["cells"], found, item["measure"]) for found in by_seed]
    return mean([pair[0] for pair in pairs]), mean([pair[1] for pair in pairs])


def tables(experiment: Experiment, results: Path) -> list[str]:
    """Markdown of all of an experiment's fits."""
    lines: list[str] = []
    for fit in experiment.fits:
        lines += [
            f"| {fit['name']}: reading | distance | fits, up to {fit['limit']} | nats | seeds |",
            "|---|---:|---|---:|---:|",
        ]
        for item in fit["readings"]:
            found = reading(fit, item, experiment, results)
            if found is None:
                lines.append(f"| {item['name']} | not run | | | |")
                continue
            place, nats = found
            word = "yes" if place.value <= fit["limit"] else "no"
            lines.append(
                f"| {item['name']} | {_with_error(place)} | {word} | {_with_error(nats)} "
                f"| {place.count} |"
            )
        lines.append("")
    return lines


def _with_error(found: Mean) -> str:
    return f"{found.value:.3f}" + (f" ± {found.error:.3f}" if found.error else "")
