"""What the rules that decide token by token have in common (SPEC 8.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from bitskip_ref.checks import check_exit_layer, is_number, is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.excerpt import shown


@dataclass(frozen=True)
class DynamicExit:
    """Stop after the first of the blocks looked at whose measure exceeds `threshold`."""

    threshold: float
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)  # None: `usual_looks`
    last: int | None = field(default=None, kw_only=True)  # block that none goes beyond; None: L

    def deepest(self, config: ModelConfig) -> int:
        return check_exit_layer(self.last, config)

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        if not is_number(self.threshold):
            raise ValueError(f"exit threshold {self.threshold!r}: must be a number from 0 to 1")
        if self.layers is None:
            return self.usual_looks(self.deepest(config))
        try:
            return tuple(sorted({*self.layers}))
        except TypeError:
            raise ValueError(
                f"exit looks {self.layers!r}: must be whole numbers of blocks, in a tuple"
            ) from None

    def usual_looks(self, deepest: int) -> tuple[int, ...]:
        """Where this rule looks if it is not told: after every block but the last."""
        return tuple(range(1, deepest))

    def check(self, config: ModelConfig) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"exit threshold {shown(self.threshold)}: must be between 0 and 1")
        deepest = self.deepest(config)
        for n in self.layers or ():
            if not is_whole(n) or not 1 <= n < deepest:
                rule = f"choose 1..{deepest - 1}" if deepest > 1 else "there is nothing to skip"
                raise ValueError(f"exit look {n}: must be below block {deepest}, the last; {rule}")
