"""What every engine's KV cache has in common."""

from __future__ import annotations

from bitskip_ref.config import ModelConfig

KV_CACHES = ("float32", "float16")
"""What the numbers of a cache may be (SPEC 6.5)."""


def check_kv_cache(kv_cache: str) -> str:
    """One of KV_CACHES. Raises ValueError for another word."""
    if kv_cache not in KV_CACHES:
        raise ValueError(f"KV cache {kv_cache!r}: must be {' or '.join(KV_CACHES)}")
    return kv_cache


class CacheFill:
    """How far a KV cache is filled (SPEC 8.2); every engine's cache is one.

    `length` counts positions. It may be lowered, to forget the positions from there on.
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        self.kv_cache = check_kv_cache(kv_cache)
        self.length = 0
        self._filled = [0] * config.num_hidden_layers  # positions that each block has run
        self._known, self._depth = 0, config.num_hidden_layers  # a length, and its whole blocks

    def require(self, blocks: int) -> None:
        """Raise ValueError unless blocks 1..`blocks` hold every position so far."""
        if self.length != self._known:
            if self.length < 0:
                raise ValueError(f"cache length {self.length}: must be 0 or more")
            self._filled = [min(n, self.length) for n in self._filled]  # what was forgotten is gone
            self._known, self._depth = self.length, self._filled.count(self.length)
        if self._depth < blocks:
            raise ValueError(
                f"the cache was filled at exit layer {self._depth} and cannot serve {blocks}: "
                "keep to that exit, or start with a new cache"
            )

    def advance(self, tokens: int, blocks: int) -> None:
        """Note that blocks 1..`blocks` ran `tokens` more positions."""
        self.length += tokens
        self._filled[:blocks] = [self.length] * blocks
        self._known, self._depth = self.length, blocks
