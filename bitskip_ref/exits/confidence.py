"""The exit's own prediction decides (SPEC 8.5)."""

from __future__ import annotations

from dataclasses import dataclass

from bitskip_ref.config import ModelConfig
from bitskip_ref.constants import MEASURES
from bitskip_ref.exits.dynamic import DynamicExit
from bitskip_ref.rule import Probe


@dataclass(frozen=True)
class ConfidenceExit(DynamicExit):
    """The measure is one of the prediction's. A look costs the whole head: few are usual."""

    threshold: float = 0.9
    measure: str = "max"

    def usual_looks(self, deepest: int) -> tuple[int, ...]:
        """After a quarter, half and three quarters of the blocks, rounded down."""
        return tuple(sorted({deepest * n // 4 for n in (1, 2, 3)} - {0}))

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        if self.measure not in MEASURES:
            raise ValueError(f"confidence measure {self.measure!r}: one of {', '.join(MEASURES)}")
        return super().looks(config)

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        self.looks(config)

    def stops(self, probe: Probe) -> bool:
        return float(probe.confidence(self.measure)) > self.threshold
