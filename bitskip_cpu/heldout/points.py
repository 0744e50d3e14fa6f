"""Settings on the curve of `exits`: which are worth taking, and what fixed exits would give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitskip_cpu.heldout.scoring import Stepped
from bitskip_cpu.heldout.work import multiply_adds
from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.named import describe_rule, rule_label
from bitskip_ref.heldout import HeldOutLoss

Against = tuple[float, float | None] | None


@dataclass(frozen=True, eq=False)
class Point:
    """A setting on the curve."""

    found: Stepped
    label: str
    kind: int | str  # blocks of a fixed exit, or the measure
    threshold: float | None
    # Its loss less that of fixed exits of the same mean depth, multiply-adds or time a token, and
    # the error; None: no such exits.
    against_fixed: Against
    at_equal_multiply_adds: Against
    at_equal_time: Against
    pareto: bool  # no other is as fast and better, or as good and faster


def points(found: Sequence[Stepped], config: ModelConfig) -> list[Point]:
    """The curve of settings that were run on one text."""
    fixed = [s for s in found if not s.rule.looks(config)]
    speeds = [s.tokens_per_s or 0.0 for s in found]
    costs: tuple[Callable[[Stepped], float], ...] = (
        lambda s: s.mean_depth,
        lambda s: multiply_adds(s.rule, config, s.depths),
        _seconds,
    )
    made = []
    for s, speed in zip(found, speeds, strict=True):
        facts = describe_rule(s.rule, config)
        beaten = any(
            v >= speed
            and o.losses.loss <= s.losses.loss
            and (v > speed or o.losses.loss < s.losses.loss)
            for o, v in zip(found, speeds, strict=True)
        )
        looking = facts["looks"] is not None
        depth, work, seconds = (_against(s, fixed, c) if looking else None for c in costs)
        label, kind = rule_label(s.rule, config), facts["exit_layer"]
        made.append(Point(s, label, kind, facts["threshold"], depth, work, seconds, not beaten))
    return made


def _seconds(s: Stepped) -> float:
    return 1 / s.tokens_per_s if s.tokens_per_s else 0.0


def _against(s: Stepped, fixed: Sequence[Stepped], cost: Callable[[Stepped], float]) -> Against:
    """The loss less that of two fixed exits, neighbours in depth, mixed to cost a token the same.

    None where no two have such a cost between theirs. Where times do not rise with depth the least
    loss of such mixtures counts.
    """
    wanted, mixed = cost(s), list[HeldOutLoss]()
    for low, high in itertools.pairwise(sorted(fixed, key=lambda f: f.mean_depth)):
        less, more = cost(low), cost(high)
        if less <= wanted <= more:
            share = (wanted - less) / (more - less) if more > less else 1.0
            a, b = low.losses, high.losses
            sums = a.sums + share * (b.sums - a.sums)
            mixed.append(HeldOutLoss(sums, a.sizes, a.text_bytes))
    return s.losses.above(min(mixed, key=lambda m: m.loss)) if mixed else None
