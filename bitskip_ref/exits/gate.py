"""The learned routing gate decides (SPEC 8.4, v2 Eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass

from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Probe


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless the threshold is a probability."""
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"exit threshold {threshold}: must be between 0 and 1")


@dataclass(frozen=True)
class GateExit:
    """Stop after the first block whose gate's probability exceeds `threshold`."""

    threshold: float = 0.5

    def fixed_depth(self, config: ModelConfig) -> int | None:
        return None

    def check(self, config: ModelConfig) -> None:
        check_threshold(self.threshold)
        if not config.gates:
            raise ValueError(
                "this model has no routing gates; choose a fixed exit layer or a confidence exit"
            )

    def stops(self, probe: Probe) -> bool:
        return float(probe.gate()) > self.threshold
