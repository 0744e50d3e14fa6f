"""Every token runs the same number of blocks (SPEC 8.2)."""

from __future__ import annotations

from dataclasses import dataclass

from bitskip_ref.checks import check_exit_layer
from bitskip_ref.config import ModelConfig
from bitskip_ref.rule import Probe


@dataclass(frozen=True)
class FixedExit:
    """Run `layer` blocks, or all of them for None."""

    layer: int | None = None

    def deepest(self, config: ModelConfig) -> int:
        return check_exit_layer(self.layer, config)

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        return ()

    def check(self, config: ModelConfig) -> None:
        check_exit_layer(self.layer, config)

    def stops(self, probe: Probe) -> bool:
        return False
