"""A round of speculation whose drafts the caller chooses (SPEC 11.1, 11.3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitskip_ref.checks import check_exit_layer
from bitskip_ref.decoding.draft import Draft, check_draft


class Round:
    """A round of speculation (SPEC 11.1): `draft` token after token, then `verify` once.

    The token at hand comes first, then each draft that the caller chose from the logits before it.
    Other sequences may use the engine in between, nobody this cache. A round that is not verified
    leaves the cache as it was.
    """

    def __init__(
        self, engine: Any, cache: Any, draft: Draft, exit_layer: int | None = None
    ) -> None:
        """exit_layer: the depth N that verifies (None: L). Raises ValueError for what cannot."""
        engine._own(cache)
        self.depth = check_exit_layer(exit_layer, engine.config)
        check_draft(draft, self.depth, engine.config)
        self._engine, self._cache, self.how = engine, cache, draft
        with cache.turn.lock:
            self.first, self._taken = cache.require(self.depth), cache.turn.taken
        self.ids: list[int] = []
        self.hidden: list[Any] = []

    def draft(self, token_id: int) -> np.ndarray:
        """Run the next token to the draft exit; draft logits f32 [V'] after it.

        Raises ValueError as `Engine.extend`, and beyond 17 tokens.
        """
        z: np.ndarray = self._engine._draft_next(token_id, self._cache, self)
        return z

    def verify(self) -> np.ndarray:
        """Run all of them to depth N, once; logits f32 [k + 1, V]. The cache advances by k + 1."""
        z: np.ndarray = self._engine._verify(self.ids, self._cache, self)
        return z

    def go_on(self) -> None:
        """In the cache's turn: refuse to, if it was used since this round's last call."""
        self._taken += 1
        if self._cache.turn.taken != self._taken or self._cache.length != self.first:
            raise ValueError(
                "the cache was used by another call during a round of speculation: begin a new one"
            )
