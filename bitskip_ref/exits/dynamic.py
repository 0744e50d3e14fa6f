"""What the rules that decide token by token have in common (SPEC 8.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from bitskip_ref.config import ModelConfig


@dataclass(frozen=True)
class DynamicExit:
    """Stop after the first of the blocks looked at whose measure exceeds `threshold`."""

    threshold: float
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)  # None: `usual_looks`

    def fixed_depth(self, config: ModelConfig) -> int | None:
        return None

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        return self.usual_looks(config) if self.layers is None else tuple(sorted({*self.layers}))

    def usual_looks(self, config: ModelConfig) -> tuple[int, ...]:
        """Where this rule looks if it is not told: after every block but the last."""
        return tuple(range(1, config.num_hidden_layers))

    def check(self, config: ModelConfig) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"exit threshold {self.threshold}: must be between 0 and 1")
        for n in self.layers or ():
            if not 1 <= n < config.num_hidden_layers:
                raise ValueError(
                    f"exit look {n} is out of range: of the model's {config.num_hidden_layers} "
                    f"blocks the last cannot be skipped, choose 1..{config.num_hidden_layers - 1}"
                )
