"""How tokens are drafted (SPEC 11.1): what an engine is told about a round of speculation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitskip_ref.cache import CacheFill
from bitskip_ref.checks import check_exit_layer, check_token
from bitskip_ref.config import ModelConfig

MOST = 16  # drafts of a round, at most

Choose = Callable[[np.ndarray], int | None]
"""Draft logits f32 [V'] of a position -> the next draft, or None to end drafting."""


@dataclass(frozen=True)
class Draft:
    """Drafts come from exit `exit_layer` and from ids 0..`vocab` - 1 (None: all).

    A greedy draft whose logit leads the second largest by less than `least_lead` is not run.
    """

    exit_layer: int
    vocab: int | None = None
    least_lead: float = 0.0  # in logits; 0 drafts on, however unsure

    def check(self, exit_layer: int, config: ModelConfig) -> None:
        """Raise ValueError for what cannot draft for verification at `exit_layer`."""
        if not 1 <= self.exit_layer < exit_layer:
            rule = f"choose 1..{exit_layer - 1}" if exit_layer > 1 else "nothing lies below 1"
            raise ValueError(
                f"draft exit {self.exit_layer}: must lie below exit layer {exit_layer}, which "
                f"verifies; {rule}"
            )
        if self.vocab is not None and not 1 <= self.vocab <= config.vocab_size:
            raise ValueError(
                f"draft vocabulary {self.vocab}: must be 1..{config.vocab_size}, the first ids"
            )
        if not self.least_lead >= 0:
            raise ValueError(f"least lead {self.least_lead}: must be 0 or more")

    def check_round(
        self,
        token_id: int,
        cache: CacheFill,
        count: int,
        exit_layer: int | None,
        config: ModelConfig,
    ) -> int:
        """The depth N that verifies, once a round of `count` drafts is known to fit.

        Raises ValueError as `check`, for a count outside 0..16, and as `Engine.extend` does.
        """
        n = check_exit_layer(exit_layer, config)
        self.check(n, config)
        if not 0 <= count <= MOST:
            raise ValueError(f"{count} drafts: a round takes 0..{MOST}")
        check_token(token_id, cache, n, config, count + 1)
        return n

    def ids(
        self,
        token_id: int,
        count: int,
        choose: Choose | None,
        run: Callable[[int, bool], np.ndarray | None],
    ) -> list[int]:
        """The token and the drafts after it, drafted one by one and run (SPEC 11.1).

        run(id, whether logits are wanted): runs an id through blocks 1..E; logits f32 [V] or None.
        """
        ids, pick = [token_id], choose or self.greedy
        while True:
            full = len(ids) > count
            z = run(ids[-1], not full or choose is not None)
            if z is None:
                return ids
            z = z[: self.vocab]
            drafted = pick(z)
            if drafted is None or full:
                return ids
            if not 0 <= drafted < len(z):
                raise ValueError(f"draft {drafted}: must be an id that has a draft logit")
            ids.append(drafted)

    def greedy(self, z: np.ndarray) -> int | None:
        """SPEC 11.1: the largest of f32 [V']; None where it leads by too little."""
        return int(np.argmax(z)) if self.sure(z) else None

    def sure(self, z: np.ndarray) -> bool:
        """Whether the largest logit leads the second largest by `least_lead`."""
        if self.least_lead == 0 or len(z) == 1:
            return True
        second, first = np.partition(z, -2)[-2:]
        return bool(first - second >= np.float32(self.least_lead))
