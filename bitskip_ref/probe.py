"""What an exit rule is given to ask about a row (SPEC 8.3 to 8.5)."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import numpy as np

from bitskip_ref.constants import MEASURES


class Asked:
    """The Probe of one row after n blocks; it answers while the rule is asked, and no longer."""

    def __init__(self, engine: Any, x: Any, n: int) -> None:
        self._engine, self._x, self._n = engine, x, n
        self._logits: np.ndarray | None = None
        self._asked: int | None = None  # the thread that asks just now

    def whether(self, rule: Any) -> bool:
        """What the rule says here."""
        self._asked = get_ident()
        try:
            return bool(rule.stops(self))
        finally:
            self._asked = None

    def gate(self) -> np.float32:
        self._check()
        if not self._engine.config.gates:
            raise ValueError("this model has no routing gates: ask for a confidence")
        return self._gate()

    def confidence(self, measure: str) -> np.float32:
        self._check()
        if measure not in MEASURES:
            raise ValueError(f"confidence measure {measure!r}: one of {', '.join(MEASURES)}")
        return self._engine._confidence(self.logits(), measure)

    def logits(self) -> np.ndarray:
        """Logits f32 [V] at this exit, computed once."""
        if self._logits is None:
            self._logits = self._exit()
        return self._logits

    def _gate(self) -> np.float32:
        p: np.float32 = self._engine._gate(self._x, self._n)
        return p

    def _exit(self) -> np.ndarray:
        z: np.ndarray = self._engine._exit(self._x, self._n)[0]
        return z

    def _check(self) -> None:
        if self._asked != get_ident():
            raise RuntimeError("a probe answers within ExitRule.stops, in its thread, alone")
