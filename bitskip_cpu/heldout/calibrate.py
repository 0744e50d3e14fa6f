"""The verb `calibrate`: the fastest exit within a budget of loss, for `--exit-layer auto`."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip.tables import table
from bitskip.terminal import progress_bar
from bitskip_cpu.heldout.scoring import Advance, Stepped, step_through
from bitskip_cpu.heldout.survey import Costs, Estimate, Survey, look_layers
from bitskip_cpu.heldout.text import Text, read_text
from bitskip_cpu.model import Model
from bitskip_ref.engine import Engine
from bitskip_ref.exits import FixedExit
from bitskip_ref.exits.named import DYNAMIC, describe_rule, rule_label
from bitskip_ref.folder import GENERATION, write_auto_exit
from bitskip_ref.rule import ExitRule

FIXED = "fixed"
ONE_SIDED_95 = 1.64  # standard errors
TRIES = 3  # settings of one kind that are run, each stricter than the one before


@dataclass(frozen=True, eq=False)
class Candidate:
    """A setting that was run on the text, beside full depth."""

    kind: str  # `fixed` or a measure
    found: Stepped
    increase: float  # of perplexity over full depth's, relative
    increase_se: float | None
    speedup: float | None  # over full depth, the median over windows run in turn

    @property
    def increase_at_most(self) -> float:
        """The increase that 95 of 100 other texts of this kind and length stay below."""
        return self.increase + ONE_SIDED_95 * (self.increase_se or 0.0)

    def facts(self) -> dict[str, Any]:
        """JSON values that say how good it is."""
        return {
            "loss": self.found.losses.loss,
            "loss_se": self.found.losses.loss_se,
            "perplexity_increase": self.increase,
            "perplexity_increase_se": self.increase_se,
            "mean_exit_layer": self.found.mean_depth,
            "speedup": self.speedup,
        }


class Calibration:
    """Candidates on one text, and the choice among them."""

    def __init__(
        self, engine: Engine, text: Text, budget: float, kinds: Sequence[str], context: int | None
    ) -> None:
        """budget: relative increase of perplexity allowed; kinds: `fixed` and measures."""
        if not 0 <= budget <= 1:
            raise ValueError(f"budget {budget}: must be between 0 and 1 (0.04 or 4%: 4 percent)")
        dynamic = DYNAMIC if engine.config.num_hidden_layers > 1 else ()
        known = [FIXED, *(m for m in dynamic if m != "gate" or engine.config.gates)]
        for kind in kinds:
            if kind not in known:
                raise ValueError(f"rule {kind!r}: for this model choose of {', '.join(known)}")
        self.engine, self.text, self.context = engine, text, context
        self.budget, self.kinds = budget, list(kinds) or known
        self.candidates: list[Candidate] = []
        self.full: Stepped

    def run(self) -> None:
        """Fill `full` and `candidates`. The bar counts passes over the text, about."""
        measures = [k for k in self.kinds if k != FIXED]
        with progress_bar("calibrating", 2 * len(measures) + 3) as done:
            share = 1 / (len(self.text.tokens) - 1)
            advance = lambda tokens: done(tokens * share)  # noqa: E731
            costs = Costs.measure(self.engine, self.text, measures)
            survey = Survey(self.engine, self.text, measures, context=self.context, advance=advance)
            losses = {n: float(values.mean()) for n, values in survey.losses.items()}
            blocks = self.engine.config.num_hidden_layers
            highest = losses[blocks] + math.log1p(self.budget)
            fixed = min(n for n, loss in losses.items() if loss <= highest)
            trying = {m: e for m in measures if (e := _best(survey, m, highest, costs))}
            rules: dict[str, ExitRule] = {FIXED: FixedExit(fixed)} if FIXED in self.kinds else {}
            for _ in range(TRIES):
                rules |= {m: e.rule for m, e in trying.items()}
                found = self._run(FixedExit(blocks), rules, advance)
                rules = {}
                if (
                    FIXED in found
                    and found[FIXED].increase_at_most > self.budget
                    and fixed < blocks
                ):
                    fixed += 1
                    rules = {FIXED: FixedExit(fixed)}
                # What is over the budget ran worse than it was judged: ask for that much less.
                missed = {
                    m: math.log1p(found[m].increase_at_most) - math.log1p(self.budget)
                    for m, e in trying.items()
                    if found[m].increase_at_most > self.budget
                }
                stricter = (
                    (m, _best(survey, m, highest - 1.2 * x, costs)) for m, x in missed.items()
                )
                trying = {m: e for m, e in stricter if e}
                if not trying and not rules:
                    break

    def _run(
        self, full: ExitRule, rules: dict[str, ExitRule], advance: Advance
    ) -> dict[str, Candidate]:
        """Candidates of settings that are run in turn with full depth."""
        self.full, *found = step_through(
            self.engine, self.text, [full, *rules.values()],
            context=self.context, advance=advance,
        )  # fmt: skip
        made = {k: _candidate(k, s, self.full) for k, s in zip(rules, found, strict=True)}
        self.candidates += made.values()
        return made

    def choice(self) -> Candidate | None:
        """The fastest within the budget; None if none is faster than full depth."""
        within = [c for c in self.candidates if c.increase_at_most <= self.budget]
        good = [c for c in within if (c.speedup or 0) > 1]
        return max(good, key=lambda c: c.speedup or 0, default=None)


def _candidate(kind: str, found: Stepped, full: Stepped) -> Candidate:
    more, error = found.losses.above(full.losses)
    timed = full.steps > 0
    ratios = full.seconds[timed] / found.seconds[timed]
    speedup = float(np.median(ratios)) if ratios.size else None
    increase_se = None if error is None else math.exp(more) * error
    return Candidate(kind, found, math.expm1(more), increase_se, speedup)


def _best(survey: Survey, measure: str, highest: float, costs: Costs) -> Estimate | None:
    """The setting of a measure that should be fastest with a loss of at most `highest`."""
    found = (
        survey.judge(measure, threshold, layers, last, costs)
        for last, layers in _places(survey, measure, highest)
        for threshold in survey.thresholds(measure, layers)
    )
    return min((e for e in found if e.loss <= highest), key=lambda e: e.seconds, default=None)


def _places(survey: Survey, measure: str, highest: float) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(last block, looks below it): one look or two; for a gate also every block from one on."""
    layers = look_layers(measure, survey.config)
    lasts = [n for n, losses in survey.losses.items() if losses.mean() <= highest]
    twelfths = look_layers("max", survey.config)
    for last in lasts:
        below = [n for n in twelfths if n < last]
        for count in (1, 2):
            for chosen in itertools.combinations(below, count):
                yield last, chosen
        if measure == "gate":
            for first in below:
                yield last, tuple(n for n in layers if first <= n < last)


def calibrate(
    model: Model,
    path: Path,
    budget: float,
    kinds: Sequence[str],
    context: int | None,
    limit: int,
    as_json: bool,
    dry_run: bool,
) -> str:
    """What `bitskip-cpu calibrate` prints; the choice goes into the model folder."""
    folder = model.folder
    if not dry_run and not os.access(folder.path, os.W_OK):
        raise ValueError(
            f"{folder.path} cannot be written: calibrate a copy of it, or look only (--dry-run)"
        )
    calibration = Calibration(model.engine, read_text(path, model, limit), budget, kinds, context)
    calibration.run()
    chosen, full = calibration.choice(), calibration.full
    rule = chosen.found.rule if chosen else full.rule
    found = {
        "budget": budget,
        "text": path.name,
        "tokens": full.losses.tokens,
        "context": context or model.config.max_position_embeddings,
        "full_loss": full.losses.loss,
        **(chosen.facts() if chosen else {"loss": full.losses.loss}),
    }
    if not dry_run:
        write_auto_exit(folder, rule, found)
    if as_json:
        rows = [{**c.found.facts(model.config), **c.facts()} for c in calibration.candidates]
        auto_exit = {**describe_rule(rule, model.config), **found}
        facts = {"model": str(folder.path), "auto_exit": auto_exit, "candidates": rows}
        return json.dumps({**facts, "written": not dry_run})
    kept = "not written (--dry-run)" if dry_run else f"written to {folder.path / GENERATION}"
    return (
        f"{_table(calibration, chosen)}\n"
        f"{full.losses.tokens} tokens, full depth: loss {full.losses.loss:.4f}, "
        f"{full.tokens_per_s or 0:.0f} tokens/s\n"
        f"--exit-layer auto: {rule_label(rule, model.config)}; {kept}"
    )


def _table(calibration: Calibration, chosen: Candidate | None) -> str:
    config, rows = calibration.engine.config, []
    for c in sorted(calibration.candidates, key=lambda c: -(c.speedup or 0)):
        error = "" if c.increase_se is None else f" ± {100 * c.increase_se:.2f}"
        verdict = "chosen" if c is chosen else ""
        if c.increase_at_most > calibration.budget:
            verdict = "over the budget"
        rows.append(
            (
                rule_label(c.found.rule, config),
                f"{c.found.mean_depth:.2f}",
                f"{c.found.losses.loss:.4f}",
                f"{100 * c.increase:+.2f}{error}",
                "" if c.speedup is None else f"{c.speedup:.3f}",
                verdict,
            )
        )
    header = ("exit", "mean depth", "loss", "perplexity, %", "speed / full", "")
    return table(header, rows)
