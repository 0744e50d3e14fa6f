"""The key-value cache of one text: pages of 16 positions each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.kernels.layout import CACHE, LANES, key_slots
from bitskip_ref.cache import CacheFill
from bitskip_ref.config import ModelConfig


def padded_keys(head_dim: int) -> int:
    """Floats of a cached key: the tree of SPEC 2.2 over them has branches of 8 or 64 leaves."""
    return max(8, 1 << (head_dim - 1).bit_length())


def padded_values(head_dim: int) -> int:
    """Floats of a cached value."""
    return -(-head_dim // LANES) * LANES


class Pages:
    """Memory for `count` pages: LANES positions each, of all blocks (`layout.CACHE`)."""

    def __init__(self, config: ModelConfig, kv_cache: str, count: int) -> None:
        self.shape = config.num_hidden_layers, config.num_key_value_heads
        self.padded, self.width = padded_keys(config.head_dim), padded_values(config.head_dim)
        self.kind = np.dtype(kv_cache)
        self.values = self.kind.itemsize * self.padded * LANES  # where they begin
        self.head_bytes = self.values + self.kind.itemsize * LANES * self.width
        # An odd number of parts: else one head's would meet in few sets of the caches.
        parts = self.shape[0] * self.shape[1] | 1
        # One piece: NumPy asks for large pages from 4 MiB on; small ones cost 6 % of a short text.
        self.memory = aligned((count, parts * self.head_bytes), np.uint8)

    def addresses(self) -> np.ndarray:
        """Of all pages, int64 [count]."""
        count, size = self.memory.shape
        return self.memory.ctypes.data + size * np.arange(count)

    def parts(self, page: int, blocks: int) -> np.ndarray:
        """What the page holds of the first blocks: bytes [blocks, K, head_bytes], a view."""
        layers, heads = self.shape
        held = self.memory[page, : layers * heads * self.head_bytes]
        return held.reshape(layers, heads, self.head_bytes)[:blocks]

    def split(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys [..., E', LANES] and values [..., LANES, W] of parts [..., head_bytes]."""
        keys, values = part[..., : self.values], part[..., self.values :]
        return (
            keys.view(self.kind).reshape(*part.shape[:-1], self.padded, LANES),
            values.view(self.kind).reshape(*part.shape[:-1], LANES, self.width),
        )


class KVCache(CacheFill):
    """Keys and values of `length` positions; memory is taken as positions are first used.

    A smaller `length` forgets the positions from there on (what lies behind is overwritten).
    kv_cache: `float32`, or `float16` in half the memory (SPEC 6.5).
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        super().__init__(config, kv_cache)
        self.pages = Pages(config, kv_cache, -(-config.max_position_embeddings // LANES))
        self.table = self.pages.addresses()
        self._struct = np.zeros(1, CACHE)
        self._struct[0] = (
            self.pages.kind.itemsize, self.pages.head_bytes, self.pages.values,
            self.table.ctypes.data,
        )  # fmt: skip
        self.at = self._struct.ctypes.data
        """Where kernels find it: the address of a `layout.CACHE`."""

    def _kept(self) -> Sequence[np.ndarray]:
        blocks, size = self._filled_part()
        return [self.pages.parts(page, blocks) for page in range(-(-size // LANES))]

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Block i's keys (turned) and values: copies, f32 or f16 [S, K, E] (SPEC 6.4, 6.5)."""
        size, pages = self.config.head_dim, self.pages
        held = [pages.parts(page, i + 1)[i] for page in range(-(-self.length // LANES))]
        keys, values = pages.split(
            np.array(held, np.uint8).reshape(-1, pages.shape[1], pages.head_bytes)
        )
        keys = keys.transpose(0, 3, 1, 2).reshape(-1, pages.shape[1], pages.padded)
        values = values.transpose(0, 2, 1, 3).reshape(-1, pages.shape[1], pages.width)
        order = key_slots(pages.padded)[:size]
        return keys[: self.length, :, order], values[: self.length, :, :size]
