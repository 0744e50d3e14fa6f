"""Settings on the curve of `exits`: which are worth taking, and what fixed exits would give."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bitskip_cpu.heldout.scoring import Stepped
from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.named import describe_rule, rule_label
from bitskip_ref.heldout import HeldOutLoss


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
