"""The key-value cache of one text: pages of 16 positions each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.compiling import ATTEND, KERNELS
from bitskip_cpu.kernels.layout import CACHE, LANES, key_slots
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS
from bitskip_cpu.kernels.products.vocab_layout import OFFSET
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
        if kv_cache == "int8":
            self.padded = -(-config.head_dim // COLUMNS) * COLUMNS
        steps = 8 * LANES if kv_cache == "int8" else 0  # bytes, of keys and of values
        self.values = self.kind.itemsize * self.padded * LANES + steps  # where they begin
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

    def read(self, part: np.ndarray, head_dim: int) -> tuple[np.ndarray, ...]:
        """What parts [N, K, head_bytes] hold (`cached_arrays`): copies [N * LANES, K, ...]."""
        keys, values = part[..., : self.values], part[..., self.values :]
        if self.kind != np.int8:
            keys = keys.view(self.kind).reshape(*part.shape[:2], self.padded, LANES)
            values = values.view(self.kind).reshape(*part.shape[:2], LANES, self.width)
            order = key_slots(self.padded)[:head_dim]
            return _rows(keys.swapaxes(2, 3)[..., order]), _rows(values[..., :head_dim])
        codes, steps = keys[..., : -8 * LANES], keys[..., -8 * LANES :].view(np.float32)
        codes = codes + np.uint8(OFFSET[8])  # once more: two are 256
        shape = *part.shape[:2], self.padded // COLUMNS, LANES, COLUMNS
        codes = codes.view(np.int8).reshape(shape).swapaxes(2, 3)
        k = codes.reshape(*part.shape[:2], LANES, self.padded)[..., :head_dim]
        shape = *part.shape[:2], LANES // COLUMNS, self.width, COLUMNS
        codes = values.view(np.int8).reshape(shape).swapaxes(3, 4)
        v = codes.reshape(*part.shape[:2], LANES, self.width)[..., :head_dim]
        of_keys, of_values = steps[..., :LANES, None], steps[..., LANES:, None]
        return _rows(k), _rows(of_keys), _rows(v), _rows(of_values)


def _rows(x: np.ndarray) -> np.ndarray:
    """[N, K, LANES, ...] -> [N * LANES, K, ...]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], *x.shape[3:])


class KVCache(CacheFill):
    """Keys and values of `length` positions; memory is taken as positions are first used.

    A smaller `length` forgets the positions from there on (what lies behind is overwritten).
    kv_cache: `float32`, `float16` in half the memory, or `int8` in about a quarter (SPEC 6.5, 6.8).
    """

    def __init__(
        self,
        config: ModelConfig,
        kv_cache: str = "float32",
        pages: Pages | None = None,
        numbers: Sequence[int] = (),
    ) -> None:
        """On pages of its own, for the whole context, or on those of some numbers of `pages`."""
        super().__init__(config, kv_cache)
        if pages is None:
            numbers = range(-(-config.max_position_embeddings // LANES))
            pages = Pages(config, kv_cache, len(numbers))
        self.pages, self.numbers = pages, numbers
        self.room = min(self.room, len(numbers) * LANES)
        self.table = pages.addresses()[list(numbers)]
        self._struct = np.zeros(1, CACHE)
        self._struct[0] = (
            self.pages.kind.itemsize, self.pages.head_bytes, self.pages.values,
            self.table.ctypes.data, KERNELS.piece(ATTEND[kv_cache]),
        )  # fmt: skip
        self.at = self._struct.ctypes.data
        """Where kernels find it: the address of a `layout.CACHE`."""

    def _kept(self) -> Sequence[np.ndarray]:
        blocks, size = self._filled_part()
        return [self.pages.parts(page, blocks) for page in self.numbers[: -(-size // LANES)]]

    def layer(self, i: int) -> tuple[np.ndarray, ...]:
        """As for any cache; copies."""
        pages = self.pages
        held = [pages.parts(page, i + 1)[i] for page in self.numbers[: -(-self.length // LANES)]]
        parts = np.array(held, np.uint8).reshape(-1, pages.shape[1], pages.head_bytes)
        return tuple(x[: self.length] for x in pages.read(parts, self.config.head_dim))
