"""What the papers claim, what our runs say of it, and the one rule that gives the word.

A claim in an experiment's TOML names a figure (a mean over seeds, or a difference paired by seed)
and a range. With `paper = [a, b]`, two perplexities of the paper (or two speeds), the range is all
effects in the paper's direction of at least half of ln(a / b), in bits per byte if the figure is.
Tested is whether the mean lies at the nearer end of the range: two-sided, Student's t over seeds,
Holm's correction over all claims of all experiments, 5 %. Then the mean is inside ("reproduced")
or outside ("contradicted"); else it is "not settled". A figure measured once for all seeds (a
speed) is held against the range as it is. `untested` gives the reason for which a claim is "not
tested at this scale"; where runs lack it is "not run" or, of some seeds, "not complete".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitskip_experiments.definitions import Experiment, load, names
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.results import read_results
from bitskip_experiments.statistics import Mean, holm
from bitskip_experiments.tables import Results, comparison, number
from bitskip_experiments.units import effect

LEVEL = 0.05
_KEYS = {"name", "source", "plus", "minus", "figure", "paper", "range", "untested"}


@dataclass(frozen=True)
class Verdict:
    """A claim with what was found."""

    claim: dict[str, Any]
    experiment: str
    seeds: int  # that the experiment asks for
    found: Mean | None  # None: not tested, or not run
    low: float  # the range
    high: float
    p: float | None = None  # against the nearer end; None with too few seeds, or one measurement
    adjusted: float | None = None  # Holm's, over all claims

    @property
    def word(self) -> str:
        """The verdict: see the module."""
        if "untested" in self.claim:
            return "not tested at this scale"
        if self.found is None:
            return "not run"
        if self.found.count < self.seeds:
            return "not complete"
        if self.found.error != 0 and (self.adjusted is None or self.adjusted >= LEVEL):
            return "not settled"
        return "reproduced" if self.low <= self.found.value <= self.high else "contradicted"


def span(claim: dict[str, Any], data: str) -> tuple[float, float]:
    """The range in which the figure speaks for the claim. Raises ExperimentError."""
    if unknown := sorted(set(claim) - _KEYS):
        raise ExperimentError(f"claim {claim.get('name')!r}: unknown key {unknown[0]!r}")
    if "untested" in claim:
        return -math.inf, math.inf
    if "range" in claim:
        return float(claim["range"][0]), float(claim["range"][1])
    if "paper" not in claim:
        raise ExperimentError(f"claim {claim['name']!r}: needs paper, range or untested")
    plus, minus = claim["paper"]
    bits = "bits" in claim["figure"] or claim["figure"] == "derived.cliff"
    half = (effect(plus, minus, data) if bits else math.log(plus / minus)) / 2
    return (half, math.inf) if half > 0 else (-math.inf, half)


def verdicts(results: Path, scale: str = "cpu") -> list[Verdict]:
    """All claims of all experiments, in the papers' order, with Holm's correction over all."""
    experiments = {name: load(name, scale) for name in names()}
    read: dict[str, Results | None] = {}

    def results_of(name: str) -> Results | None:
        if name not in read:
            try:
                read[name] = read_results(results, experiments[name], None)
            except ExperimentError:
                read[name] = None
        return read[name]

    found = [
        _judge(claim, experiment, results_of)
        for experiment in experiments.values()
        for claim in experiment.claims
    ]
    found.sort(key=lambda v: v.claim["source"].removeprefix("ours, for "))
    tested = [v for v in found if v.p is not None]
    adjusted = iter(holm([v.p for v in tested if v.p is not None]))
    return [replace(v, adjusted=next(adjusted)) if v.p is not None else v for v in found]


def _judge(claim: dict[str, Any], experiment: Experiment, results_of: Any) -> Verdict:
    low, high = span(claim, experiment.data)
    verdict = Verdict(claim, experiment.name, len(experiment.seeds), None, low, high)
    if "untested" in claim:
        return verdict
    labels = [label for side in ("plus", "minus") for label in claim.get(side, ())]
    pool: Results = {}
    for label in labels:
        name, own = _place(label, experiment)
        known = results_of(name)
        if known is None or own not in known:
            return verdict
        pool[label] = known[own]
    found = comparison(claim, pool)
    ends = [end for end in (low, high) if math.isfinite(end)]
    nearer = min(ends, key=lambda end: abs(found.value - end))
    whole = found.error and found.count >= verdict.seeds
    return replace(verdict, found=found, p=found.p_value(nearer) if whole else None)


def _place(label: str, experiment: Experiment) -> tuple[str, str]:
    """(experiment, its label) of a label, which is another's where it reads `EXPERIMENT: LABEL`."""
    name, _, own = label.partition(": ")
    return (name, own) if name in names() else (experiment.name, label)


def table(found: list[Verdict]) -> list[str]:
    """Markdown rows of the claims."""
    lines = [
        "| claim | where | ours | 95 % interval | speaks for it | p (Holm) | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for v in found:
        cells = ["", "", "", ""]
        if "untested" not in v.claim:
            cells[2] = _range(v.low, v.high)
        if v.found is not None:
            cells[0] = number(v.found.value, "+.4f")
            if v.found.count < v.seeds:
                cells[0] += f" ({v.found.count} of {v.seeds} seeds)"
            if v.found.interval is not None and v.found.error:
                cells[1] = " to ".join(number(x, "+.4f") for x in v.found.interval)
        if v.adjusted is not None:
            cells[3] = f"{v.adjusted:.2g}" if v.adjusted >= 1e-4 else "< 0.0001"
        word = v.word + (f": {v.claim['untested']}" if "untested" in v.claim else "")
        where = f"{v.claim['source']} (`{v.experiment}`)"
        lines.append(f"| {v.claim['name']} | {where} | {' | '.join(cells)} | {word} |")
    return lines


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return f"at most {high:+.4f}"
    return f"at least {low:+.4f}" if math.isinf(high) else f"{low:+.4f} to {high:+.4f}"


def page(results: Path) -> str:
    """results/claims.md."""
    found = verdicts(results)
    tested = sum(v.p is not None for v in found)
    lines = [
        "# Claims and verdicts",
        "",
        *table(found),
        "",
        "- Differences of losses are in bits per byte of text, other figures in logarithms of "
        "ratios, levels in nats. Each claim, with the runs and the figure that decide it, is in "
        "`bitskip_experiments/NAME.toml` of the experiment named.",
        "- The rule (`bitskip_experiments/claims.py`): in the range is at least half the paper's "
        "effect, in its direction, or what the TOML says. Two-sided t test over seeds of the mean "
        f"against the nearer end of the range, Holm over the {tested} claims tested, 5 %: then "
        "inside is `reproduced`, outside `contradicted`; else `not settled`.",
    ]
    return "\n".join(lines) + "\n"
