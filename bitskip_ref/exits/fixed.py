"""Every token runs the same number of blocks (SPEC 8.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Probe


def check_exit_layer(exit_layer: int | None, config: ModelConfig) -> int:
    """Blocks to run, L for None. Raises ValueError outside 1..L."""
    if exit_layer is None:
        return config.num_hidden_layers
    if not 1 <= exit_layer <= config.num_hidden_layers:
        raise ValueError(
            f"exit layer {exit_layer} is out of range: the model has "
            f"{config.num_hidden_layers} blocks, choose 1..{config.num_hidden_layers}"
        )
    return int(exit_layer)


def check_exit_layers(exit_layers: Iterable[int], config: ModelConfig) -> list[int]:
    """The exits in order of depth, without repeats. Raises ValueError for none, or outside 1..L."""
    exits = sorted({check_exit_layer(n, config) for n in exit_layers})
    if not exits:
        raise ValueError("no exit layers: give at least one")
    return exits


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
