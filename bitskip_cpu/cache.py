"""The key-value cache of one text, in the layout of `kernels/attention/attend.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.kernels.layout import LANES, key_slots
from bitskip_ref.cache import CacheFill
from bitskip_ref.config import ModelConfig


def padded_keys(head_dim: int) -> int:
    """Floats of a cached key: the tree of SPEC 2.2 over them has branches of 8 or 64 leaves."""
    return max(8, 1 << (head_dim - 1).bit_length())


def padded_values(head_dim: int) -> int:
    """Floats of a cached value."""
    return -(-head_dim // LANES) * LANES


class KVCache(CacheFill):
    """Keys and values of `length` positions; memory is taken as positions are first used.

    A smaller `length` forgets the positions from there on (what lies behind is overwritten).
    kv_cache: `float32`, or `float16` in half the memory (SPEC 6.5).
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        super().__init__(config, kv_cache)
        groups = -(-config.max_position_embeddings // LANES)
        padded, width = padded_keys(config.head_dim), padded_values(config.head_dim)
        heads = config.num_hidden_layers, config.num_key_value_heads
        self.capacity = groups * LANES
        shapes = (*heads, groups, padded, LANES), (*heads, self.capacity, width)
        # One piece: NumPy asks for large pages from 4 MiB on; small ones cost 6 % of a short text.
        memory = aligned((sum(map(math.prod, shapes)),), kv_cache)
        keys, values = np.split(memory, [math.prod(shapes[0])])
        self.keys, self.values = keys.reshape(shapes[0]), values.reshape(shapes[1])
        self.keys_at, self.values_at = self.keys.ctypes.data, self.values.ctypes.data
        self.itemsize = self.keys.itemsize

    def _kept(self) -> Sequence[np.ndarray]:
        blocks, size = self._filled_part()
        groups = -(-size // LANES)
        return self.keys[:blocks, :, :groups], self.values[:blocks, :, :size]

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Block i's keys (turned) and values: copies, f32 or f16 [S, K, E] (SPEC 6.4, 6.5)."""
        size, padded = self.config.head_dim, self.keys.shape[3]
        keys = self.keys[i].transpose(1, 3, 0, 2).reshape(self.capacity, -1, padded)
        values = self.values[i].transpose(1, 0, 2)
        order = key_slots(padded)[:size]
        return keys[: self.length, :, order], values[: self.length, :, :size].copy()
