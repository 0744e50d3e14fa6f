"""What an exit rule is, and what it may ask (SPEC 8.2, 8.3)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bitskip_ref.config import ModelConfig


class Probe(Protocol):
    """What an exit rule may ask about the token at hand after a block (SPEC 8.4, 8.5)."""

    def gate(self) -> np.float32:
        """Exit probability of the block's routing gate."""

    def confidence(self, measure: str) -> np.float32:
        """`max`, `margin` or `entropy` of the logits at this exit."""


class ExitRule(Protocol):
    """A way of choosing how many blocks a token runs."""

    def deepest(self, config: ModelConfig) -> int:
        """Blocks that the prompt runs, and every token that is not stopped before: 1..L."""

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        """Depths after which `stops` is asked, rising, below `deepest`; none: a fixed exit."""

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError, with the remedy, where the rule means nothing for this model."""

    def stops(self, probe: Probe) -> bool:
        """Whether to stop here; asked at each of `looks` until it says so."""


def check_rule(rule: ExitRule) -> None:
    """Raise ValueError for what is no exit rule: a number, a word, a rule's class."""
    methods = ("deepest", "looks", "check", "stops")
    if isinstance(rule, type) or not all(hasattr(rule, name) for name in methods):
        raise ValueError(
            f"{rule!r} is no exit rule: give one like FixedExit(18) (bitskip_ref.exits)"
        )
