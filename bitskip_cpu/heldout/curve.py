"""The verb `exits`: loss and speed against exit layer, and against threshold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitskip_cpu.heldout.scoring import Stepped, step_through
from bitskip_cpu.heldout.text import read_text
from bitskip_cpu.model import Model
from bitskip_cpu.progress import progress_bar
from bitskip_cpu.tables import table
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import ExitRule
from bitskip_ref.exits.named import describe_rule, rule_label
from bitskip_ref.heldout import HeldOutLoss, check_windows


@dataclass(frozen=True, eq=False)
class Point:
    """A setting on the curve."""

    found: Stepped
    label: str
    kind: int | str  # blocks of a fixed exit, or the measure
    threshold: float | None
    # Its loss less that of fixed exits of the same mean depth, and the error; None: no such exits.
    against_fixed: tuple[float, float | None] | None
    pareto: bool  # no other is as fast and better, or as good and faster


def points(found: Sequence[Stepped], config: ModelConfig) -> list[Point]:
    """The curve of settings that were run on one text."""
    fixed = {s.rule.deepest(config): s for s in found if not s.rule.looks(config)}
    speeds = [s.tokens_per_s or 0.0 for s in found]
    made = []
    for s, speed in zip(found, speeds, strict=True):
        facts = describe_rule(s.rule, config)
        beaten = any(
            v >= speed
            and o.losses.loss <= s.losses.loss
            and (v > speed or o.losses.loss < s.losses.loss)
            for o, v in zip(found, speeds, strict=True)
        )
        same = None if facts["looks"] is None else _fixed_at(s.mean_depth, fixed)
        against = s.losses.above(same) if same else None
        label, kind = rule_label(s.rule, config), facts["exit_layer"]
        made.append(Point(s, label, kind, facts["threshold"], against, not beaten))
    return made


def _fixed_at(depth: float, fixed: dict[int, Stepped]) -> HeldOutLoss | None:
    """The loss of fixed exits mixed so that their mean depth is this; None if it is outside."""
    for low, high in itertools.pairwise(sorted(fixed)):
        if low <= depth <= high:
            share = (depth - low) / (high - low)
            a, b = fixed[low].losses, fixed[high].losses
            return HeldOutLoss(a.sums + share * (b.sums - a.sums), a.sizes, a.text_bytes)
    return fixed[round(depth)].losses if depth in fixed else None


def curve(
    model: Model,
    path: Path,
    rules: Sequence[ExitRule],
    context: int | None,
    limit: int,
    as_json: bool,
    plot: Path | None,
) -> str:
    """What `bitskip-cpu exits` prints; the picture, if one is asked for, goes to `plot`."""
    if plot is not None:
        from bitskip_cpu.heldout import plotting

        plotting.check(plot)
    config = model.config
    context, _ = check_windows(context, None, config.max_position_embeddings)
    text = read_text(path, model, limit)
    with progress_bar("measuring", len(rules) * (len(text.tokens) - 1)) as advance:
        found = step_through(model.engine, text, rules, context=context, advance=advance)
    made = points(found, config)
    counted = (
        f"{found[0].losses.tokens} tokens of {path.name}, context and stride {context}, "
        f"{model.threads} thread{'s' * (model.threads > 1)}"
    )
    if plot is not None:
        plotting.draw(made, plot, f"{model.folder.path.name}: {counted}")
    if as_json:
        about = {"model": str(model.folder.path), "text": str(path), "context": context}
        about |= {"threads": model.threads, "bytes": text.bytes, "documents": text.documents}
        return json.dumps({**about, "exits": [_facts(p, config) for p in made]})
    drawn = "" if plot is None else f"\npicture: {plot}"
    return f"{_table(made)}\n{counted}; * nothing is both faster and better{drawn}"


def _facts(p: Point, config: ModelConfig) -> dict[str, Any]:
    more, error = p.against_fixed or (None, None)
    speed = {"tokens_per_s": p.found.tokens_per_s, "pareto": p.pareto}
    against = {"loss_against_fixed": more, "loss_against_fixed_se": error}
    return {**p.found.facts(config), **speed, **against}


def _table(made: Sequence[Point]) -> str:
    rows = []
    fastest = max(made, key=lambda p: p.found.mean_depth).found.tokens_per_s
    for p in made:
        loss, speed = p.found.losses, p.found.tokens_per_s
        error = "" if loss.loss_se is None else f" ± {loss.loss_se:.4f}"
        more, more_se = p.against_fixed or (None, None)
        against = "" if more is None else f"{more:+.4f}"
        against += "" if more_se is None else f" ± {more_se:.4f}"
        rows.append(
            (
                p.label,
                f"{p.found.mean_depth:.2f}".removesuffix(".00"),
                f"{loss.loss:.4f}{error}",
                f"{loss.ppl:.3f}",
                f"{loss.bits_per_byte:.4f}",
                against,
                "" if speed is None else f"{speed:.0f}",
                "" if speed is None or not fastest else f"{speed / fastest:.2f}",
                "*" if p.pareto else "",
            )
        )
    header = (
        "exit", "mean depth", "loss", "perplexity", "bits/byte", "loss - fixed of that depth",
        "tokens/s", "of deepest", "",
    )  # fmt: skip
    return table(header, rows)
