"""The learned routing gate decides (SPEC 8.4, v2 Eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass

from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.dynamic import DynamicExit
from bitskip_ref.rule import Probe


@dataclass(frozen=True)
class GateExit(DynamicExit):
    """The measure is the block's gate; unless told otherwise it is asked after every block."""

    threshold: float = 0.5

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if not config.gates:
            raise ValueError(
                "this model has no routing gates; choose a fixed exit layer or a confidence exit"
            )

    def stops(self, probe: Probe) -> bool:
        return float(probe.gate()) > self.threshold
