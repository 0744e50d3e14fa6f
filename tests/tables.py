"""An engine whose logits are tables, so that what it generates is known without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_ref.cache import CacheFill
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.engine import Engine
from bitskip_ref.rows import Run


class TableCache(CacheFill):
    """Holds the ids themselves."""

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        super().__init__(config, kv_cache)
        self.ids: list[int] = []


class TableEngine(Engine):
    """The next logits depend on the last id alone: `full` f32 [V, V], and `early` for drafts.

    Hidden states are the ids.
    """

    cache_type = TableCache

    def __init__(self, full: np.ndarray, early: np.ndarray, context: int = 64) -> None:
        config = small_twin("bitskip-v1")
        super().__init__(config.replace(vocab_size=len(full), max_position_embeddings=context))
        self.full, self.early = full.astype(np.float32), early.astype(np.float32)
        self.cache: TableCache
        self.counts: list[int] = []  # drafts that each greedy round was allowed

    def new_cache(self) -> TableCache:
        self.cache = super().new_cache()
        return self.cache

    def speculate(
        self, token_id: int, cache: Any, count: int, draft: Draft, **options: Any
    ) -> tuple[list[int], np.ndarray]:
        self.counts.append(count)
        return super().speculate(token_id, cache, count, draft, **options)

    def _embed(self, run: Run, trace: Any = None) -> np.ndarray:
        return np.array(run.ids)

    def _blocks(
        self, x: np.ndarray, run: Run, first: int, last: int, trace: Any = None
    ) -> np.ndarray:
        run.cache.ids[run.first :] = x.tolist()
        return x

    def _exit(self, x: np.ndarray, n: int, first: int = 0, trace: Any = None) -> np.ndarray:
        table = self.full if n == self.config.num_hidden_layers else self.early
        return table[x[first:]]

    def _join(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(rows)

    _fill = _gate = _confidence = None  # type: ignore[assignment]
