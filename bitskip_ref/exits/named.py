"""Exit rules as words and numbers: on a command line, and in a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.confidence import MEASURES, ConfidenceExit
from bitskip_ref.exits.dynamic import DynamicExit
from bitskip_ref.exits.fixed import FixedExit
from bitskip_ref.exits.gate import GateExit
from bitskip_ref.rule import ExitRule

DYNAMIC = ("gate", *MEASURES)


def named_rule(
    exit_layer: int | str | None,
    threshold: float | None,
    looks: Sequence[int] | None,
    last: int | None,
    config: ModelConfig,
) -> ExitRule:
    """The rule of that name, checked for the model.

    exit_layer: blocks every token runs (1..L; None: all), or what decides token by token: `gate`
    (SPEC 8.4), `max`, `margin` or `entropy` (SPEC 8.5). For the latter, threshold: in 0..1 (None:
    0.5 for gates, else 0.9); last: the block that no token goes beyond (None: L); looks: after
    which blocks below that (None: the rule's usual ones). Raises ValueError.
    """
    rule: ExitRule
    layers = None if looks is None else tuple(looks)
    if exit_layer is None or isinstance(exit_layer, int):
        if (threshold, looks, last) != (None, None, None):
            raise ValueError(
                "an exit threshold, looks and a last block need an exit that has them: "
                f"{', '.join(DYNAMIC)}"
            )
        rule = FixedExit(exit_layer)
    elif exit_layer == "gate":
        rule = GateExit(0.5 if threshold is None else threshold, layers=layers, last=last)
    elif exit_layer in MEASURES:
        least = 0.9 if threshold is None else threshold
        rule = ConfidenceExit(least, exit_layer, layers=layers, last=last)
    else:
        raise ValueError(
            f"exit layer {exit_layer!r}: must be a number of blocks, or {', '.join(DYNAMIC)}, auto"
        )
    rule.check(config)
    return rule


def describe_rule(rule: ExitRule, config: ModelConfig) -> dict[str, Any]:
    """The arguments of `named_rule` that give this rule again: JSON values, nothing left open."""
    last = rule.deepest(config)
    if not isinstance(rule, DynamicExit):
        return {"exit_layer": last, "threshold": None, "looks": None, "last": None}
    name = rule.measure if isinstance(rule, ConfidenceExit) else "gate"
    looks = list(rule.looks(config))
    return {"exit_layer": name, "threshold": rule.threshold, "looks": looks, "last": last}


def rule_label(rule: ExitRule, config: ModelConfig) -> str:
    """A rule in a table: `18`, or `max > 0.9 at 6, 12, else 18`."""
    facts = describe_rule(rule, config)
    looks, last = facts["looks"], facts["last"]
    if looks is None:
        return str(facts["exit_layer"])
    every = len(looks) > 3 and looks == list(range(1, last))
    places = "every block" if every else ", ".join(map(str, looks))
    return f"{facts['exit_layer']} > {facts['threshold']:.4g} at {places}, else {last}"
