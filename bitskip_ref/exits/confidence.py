"""The exit's own prediction decides (SPEC 8.5)."""

from __future__ import annotations

from dataclasses import dataclass

from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Probe
from bitskip_ref.exits.gate import check_threshold

MEASURES = ("max", "margin", "entropy")


@dataclass(frozen=True)
class ConfidenceExit:
    """Stop after the first block whose prediction's `measure` exceeds `threshold`."""

    threshold: float = 0.9
    measure: str = "max"

    def fixed_depth(self, config: ModelConfig) -> int | None:
        return None

    def check(self, config: ModelConfig) -> None:
        check_threshold(self.threshold)
        if self.measure not in MEASURES:
            raise ValueError(f"confidence measure {self.measure!r}: one of {', '.join(MEASURES)}")

    def stops(self, probe: Probe) -> bool:
        return float(probe.confidence(self.measure)) > self.threshold
