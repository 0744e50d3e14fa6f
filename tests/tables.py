"""An engine whose logits are tables, so that what it generates is known without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_ref.cache import CacheFill
from bitskip_ref.checks import check_input
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.decoding.draft import Choose, Draft


class TableCache(CacheFill):
    """Holds the ids themselves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.ids: list[int] = []


class TableEngine:
    """The next logits depend on the last id alone: `full` f32 [V, V], and `early` for drafts."""

    def __init__(self, full: np.ndarray, early: np.ndarray, context: int = 64) -> None:
        self.full, self.early = full.astype(np.float32), early.astype(np.float32)
        self.config = small_twin("bitskip-v1").replace(
            vocab_size=len(full), max_position_embeddings=context
        )
        self.cache: TableCache
        self.counts: list[int] = []  # drafts that each round was allowed

    def new_cache(self) -> TableCache:
        self.cache = TableCache(self.config)
        return self.cache

    def extend(
        self, token_ids: Sequence[int], cache: TableCache, *, exit_layer: int, **_: Any
    ) -> np.ndarray:
        ids = check_input(token_ids, cache, exit_layer, self.config)
        cache.ids[cache.length :] = ids.tolist()
        cache.advance(len(ids), exit_layer)
        return self.full[ids]

    def step(self, token_id: int, cache: TableCache, rule: Any) -> tuple[np.ndarray, int]:
        depth = rule.deepest(self.config)
        return self.extend([token_id], cache, exit_layer=depth)[0], depth

    def speculate(
        self,
        token_id: int,
        cache: TableCache,
        count: int,
        draft: Draft,
        *,
        exit_layer: int | None = None,
        choose: Choose | None = None,
    ) -> tuple[list[int], np.ndarray]:
        n = draft.check_round(token_id, cache, count, exit_layer, self.config)
        self.counts.append(count)
        ids = draft.ids(token_id, count, choose, lambda token, _: self.early[token])
        return ids[1:], self.extend(ids, cache, exit_layer=n)
