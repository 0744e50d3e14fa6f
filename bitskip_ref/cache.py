"""What every engine's KV cache has in common."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_ref.config import ModelConfig
from bitskip_ref.constants import INT8_CACHE_POSITIONS, KV_CACHES
from bitskip_ref.turn import IN_USE, Turn


def check_kv_cache(kv_cache: str, config: ModelConfig) -> str:
    """One of KV_CACHES. Raises ValueError for another word, or one not for such a model."""
    if kv_cache not in KV_CACHES:
        raise ValueError(f"KV cache {kv_cache!r}: must be {' or '.join(KV_CACHES)}")
    if kv_cache == "int8" and not int8_cache_fits(config):
        positions = config.max_position_embeddings
        raise ValueError(
            f"KV cache int8: the model has {positions} positions, exact sums fit up to "
            f"{INT8_CACHE_POSITIONS} (SPEC 6.8): use float16"
        )
    return kv_cache


def usual_kv_cache(recommended: str | None, usual: str, config: ModelConfig) -> str:
    """What caches hold where nobody says: as the model recommends, else `usual` if it may be."""
    if recommended is None and usual == "int8" and not int8_cache_fits(config):
        return "float16"
    return recommended or usual


def int8_cache_fits(config: ModelConfig) -> bool:
    """Whether an int8 cache can hold all of the model's positions (SPEC 6.8)."""
    return config.max_position_embeddings <= INT8_CACHE_POSITIONS


def cached_arrays(config: ModelConfig, kv_cache: str) -> dict[str, tuple[type, tuple[int, ...]]]:
    """What a cache holds of a block: name -> dtype, shape behind [S] (SPEC 6.4, 6.5, 6.8).

    Keys are turned. An int8 cache has a step for each of its keys and values.
    """
    heads, wide = config.num_key_value_heads, (config.num_key_value_heads, config.head_dim)
    if kv_cache == "int8":
        codes, step = (np.int8, wide), (np.float32, (heads, 1))
        return {"keys": codes, "key_steps": step, "values": codes, "value_steps": step}
    kind = np.float16 if kv_cache == "float16" else np.float32
    return {"keys": (kind, wide), "values": (kind, wide)}


class CacheFill:
    """How far a KV cache is filled (SPEC 8.2); every engine's cache is one.

    `length` counts positions. It may be lowered, to forget the positions from there on, but not
    while an engine uses the cache.
    `fork()`, `copy.copy`, `copy.deepcopy` and `pickle` give another cache with the same positions
    (SPEC 12.3); neither shows in the other from then on, and no more is copied than is filled.
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        self.config, self.kv_cache = config, check_kv_cache(kv_cache, config)
        self.turn = Turn()
        self.room = config.max_position_embeddings
        """How many positions it can hold."""
        self.length = 0
        self._filled = [0] * config.num_hidden_layers  # positions that each block has run
        self._known, self._depth = 0, config.num_hidden_layers  # a length, and its whole blocks

    def require(self, blocks: int) -> int:
        """The length. Raises ValueError unless blocks 1..`blocks` hold every position so far."""
        length = self.length  # once: another thread may set it at any time
        if type(length) is not int or length != self._known:  # not float32(1) != 10**400
            self._note(length)
        self.serves(blocks, self._depth)
        return self._known

    @staticmethod
    def serves(blocks: int, depth: int) -> None:
        """Raise ValueError where blocks 1..`blocks` are wanted and 1..`depth` are there."""
        if depth < blocks:
            raise ValueError(
                f"the cache was filled at exit layer {depth} and cannot serve {blocks}: "
                "keep to that exit, or start with a new cache"
            )

    def advance(self, first: int, tokens: int, blocks: int) -> None:
        """Note that blocks 1..`blocks` ran `tokens` positions from `first` on.

        Raises ValueError if `length` is not `first`: somebody has set it since.
        """
        self.unchanged(first)
        self.length = first + tokens
        self._filled[:blocks] = [self.length] * blocks
        self._known, self._depth = self.length, blocks

    def unchanged(self, first: int) -> None:
        """Raise ValueError unless `length` is still `first`."""
        if self.length != first:
            raise ValueError(
                f"the cache's length was set to {self.length!r} while an engine ran positions from "
                f"{first} on: leave it alone until the call is over"
            )

    def _note(self, length: Any) -> None:
        """Take over a length that was set from outside: what it cuts off is gone."""
        try:
            length = operator.index(length)
        except TypeError:
            raise ValueError(f"cache length {length!r}: must be a whole number") from None
        if length < 0:
            raise ValueError(f"cache length {length}: must be 0 or more")
        self._filled = [min(n, length) for n in self._filled]
        self.length = self._known = length
        self._depth = self._filled.count(length)

    def layer(self, i: int) -> tuple[np.ndarray, ...]:
        """What is held of block i up to `length`, in the order of `cached_arrays`: [S, ...]."""
        raise NotImplementedError

    # ---- copies ---------------------------------------------------------------------

    def fork(self) -> Any:
        """Another cache with the same positions. Raises RuntimeError in a callback that uses it."""
        with self.turn.lock:
            self._at_rest()
            return _filled_as(self._copy_type(), *self._facts(), self._kept())

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.fork()

    def __reduce__(self) -> tuple[Any, ...]:
        with self.turn.lock:
            self._at_rest()
            kept = [np.array(part) for part in self._kept()]  # a view would bring all behind it
            return _filled_as, (self._copy_type(), *self._facts(), kept)

    def _at_rest(self) -> None:
        if self.turn.owner is not None:
            raise RuntimeError(IN_USE)
        self.require(0)

    def _facts(self) -> tuple[ModelConfig, str, int, list[int]]:
        return self.config, self.kv_cache, self.length, list(self._filled)

    def _copy_type(self) -> type[CacheFill]:
        """What copies of it are."""
        return type(self)

    def _filled_part(self) -> tuple[int, int]:
        """(blocks, positions) that hold all that was filled."""
        return sum(n > 0 for n in self._filled), max(self._filled)

    def _kept(self) -> Sequence[np.ndarray]:
        """What was filled: arrays that `_keep` of an equally filled cache takes; views at best."""
        raise NotImplementedError

    def _keep(self, kept: Sequence[np.ndarray]) -> None:
        """Hold what another cache's `_kept` gave, as long as that may change; else its arrays."""
        for mine, given in zip(self._kept(), kept, strict=True):
            mine[...] = given


def _filled_as(
    kind: type[CacheFill], config: ModelConfig, kv_cache: str, length: int, filled: list[int],
    kept: Sequence[np.ndarray],
) -> Any:  # fmt: skip
    """A cache of that kind, filled so far, with those positions."""
    cache = kind(config, kv_cache)
    cache._filled = filled
    cache._note(length)
    cache._keep(kept)
    return cache


class ArrayCache(CacheFill):
    """What `cached_arrays` names, of each block: `arrays[name][block]` [S, ...].

    The arrays are replaced, never written to, so that copies share them.
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        super().__init__(config, kv_cache)
        self.arrays: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, *shape), kind)] * config.num_hidden_layers
            for name, (kind, shape) in cached_arrays(config, kv_cache).items()
        }
        self.keys, self.values = self.arrays["keys"], self.arrays["values"]

    def layer(self, i: int) -> tuple[np.ndarray, ...]:
        return tuple(blocks[i][: self.length] for blocks in self.arrays.values())

    def _kept(self) -> Sequence[np.ndarray]:
        blocks, size = self._filled_part()
        return [part[:size] for held in self.arrays.values() for part in held[:blocks]]

    def _keep(self, kept: Sequence[np.ndarray]) -> None:
        blocks = len(kept) // len(self.arrays)
        for k, held in enumerate(self.arrays.values()):
            held[:blocks] = kept[k * blocks : (k + 1) * blocks]
