"""How tokens are drafted (SPEC 11.1): what an engine is told about a round of speculation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bitskip_ref.checks import is_number, is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.excerpt import shown

MOST = 16  # drafts of a round, at most
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Draft:
    """Drafts come from exit `exit_layer` and from ids 0..`vocab` - 1 (None: all).

    A draft whose logit leads the second largest by less than `least_lead` is not run.
    """

    exit_layer: int
    vocab: int | None = None
    least_lead: float = 0.0  # in logits; 0 drafts on, however unsure

    def check(self, exit_layer: int, config: ModelConfig) -> None:
        """Raise ValueError for what cannot draft for verification at `exit_layer`."""
        if not is_whole(self.exit_layer) or not 1 <= self.exit_layer < exit_layer:
            rule = f"choose 1..{exit_layer - 1}" if exit_layer > 1 else "nothing lies below 1"
            raise ValueError(
                f"draft exit {self.exit_layer}: must lie below exit layer {exit_layer}, which "
                f"verifies; {rule}"
            )
        if self.vocab is not None and not (
            is_whole(self.vocab) and 1 <= self.vocab <= config.vocab_size
        ):
            raise ValueError(
                f"draft vocabulary {self.vocab}: must be 1..{config.vocab_size}, the first ids"
            )
        if not is_number(self.least_lead) or not self.least_lead >= 0:
            raise ValueError(f"least lead {shown(self.least_lead)}: must be a number, 0 or more")

    def greedy(self, z: np.ndarray) -> int | None:
        """SPEC 11.1: the largest of f32 [V']; None where it leads by too little."""
        return int(np.argmax(z)) if self.sure(z) else None

    def sure(self, z: np.ndarray) -> bool:
        """Whether the largest logit is finite and leads the second largest by `least_lead`."""
        if not np.isfinite(z.max()):
            return False
        if self.least_lead == 0 or len(z) == 1:
            return True
        second, first = np.partition(z, -2)[-2:]
        return bool(first - second >= np.float32(bounded(self.least_lead)))


def check_draft(draft: Draft, exit_layer: int, config: ModelConfig) -> None:
    """Raise ValueError for what is no Draft, or cannot draft for verification at `exit_layer`."""
    if not isinstance(draft, Draft):
        raise ValueError(f"{shown(draft)} is not how tokens are drafted: give a Draft")
    draft.check(exit_layer, config)


def bounded(lead: float) -> float:
    """A lead that can be cast to f32: infinity where it is a number larger than any of those."""
    return lead if lead <= LARGEST else np.inf


class GreedyRound(NamedTuple):
    """A round of greedy drafts of one sequence, after what its cache holds (SPEC 11.1, 11.2)."""

    token_id: int
    cache: Any  # from the engine's `new_cache`
    most: int  # drafts, 0..16
    draft: Draft
    exit_layer: int | None = None  # the depth N that verifies; None: L
