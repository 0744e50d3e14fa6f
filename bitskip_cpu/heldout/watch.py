"""A rule that never stops and notes what every other rule would have seen."""

from __future__ import annotations

from collections.abc import Sequence

from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.confidence import MEASURES
from bitskip_ref.rule import Probe


class Watch:
    """`seen`: measure -> its values, look after look and token after token."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[int] | None = None,
        measures: Sequence[str] | None = None,
    ) -> None:
        """layers: where to look (None: after every block but the last); measures (None: all)."""
        every = range(1, config.num_hidden_layers)
        self.layers = tuple(every if layers is None else layers)
        if measures is None:
            measures = (*MEASURES, "gate") if config.gates else MEASURES
        self.seen: dict[str, list[float]] = {name: [] for name in measures}

    def deepest(self, config: ModelConfig) -> int:
        """All blocks."""
        return config.num_hidden_layers

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        """Where it was told to look."""
        return self.layers

    def check(self, config: ModelConfig) -> None:
        """Any model will do."""

    def stops(self, probe: Probe) -> bool:
        """No, but note the measures."""
        for name, values in self.seen.items():
            values.append(float(probe.gate() if name == "gate" else probe.confidence(name)))
        return False
