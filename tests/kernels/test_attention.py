"""RoPE, the cache's layout and attention of one head against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.cache import KVCache, padded_keys, padded_values
from bitskip_cpu.kernels.attention import attend as kernels
from bitskip_cpu.kernels.layout import LANES, key_slots
from bitskip_ref.arithmetic.attention import attention
from bitskip_ref.arithmetic.functions import half
from bitskip_ref.arithmetic.rope import apply_rope
from bitskip_ref.config import small_twin
from bitskip_ref.constants import KV_CACHES
from tests.kernels.calling import call, same_bits

f32 = np.float32


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=f32)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rope(head_dim: int) -> None:
    x, cos, sin = random(head_dim), random(head_dim // 2, seed=1), random(head_dim // 2, seed=2)
    expected = apply_rope(x[None, None], cos[None], sin[None])[0, 0]
    call(kernels.rope, x, cos, sin, head_dim)
    assert same_bits(expected, x)


KINDS = "float32", "float16"


class Head:
    """Keys and values [S, E] of one head in pages that lie anywhere, other positions filled."""

    def __init__(
        self, keys: np.ndarray, values: np.ndarray, behind: float = 0.0, kind: str = "float32"
    ) -> None:
        size, head_dim = keys.shape
        self.padded, self.width = padded_keys(head_dim), padded_values(head_dim)
        self.slots = key_slots(self.padded)
        count, self.itemsize = -(-size // LANES), np.dtype(kind).itemsize
        self.pages = np.full((3 * count, LANES * (self.padded + self.width)), -behind, kind)
        order = np.random.default_rng(size).permutation(3 * count)[:count]
        self.table = self.pages.ctypes.data + self.pages.strides[0] * order
        self.values_in = self.itemsize * LANES * self.padded
        for position, (key, value) in enumerate(zip(keys, values, strict=True)):
            page, lane = divmod(position, LANES)
            k_at = self.pages[order[page], : LANES * self.padded]
            v_at = self.pages[order[page], LANES * self.padded :]
            if lane == 0:
                k_at[:] = behind
                k_at.reshape(self.padded, LANES)[self.slots[head_dim:]] = 0
            call(kernels.store_key, key.copy(), k_at, self.itemsize, self.padded, head_dim,
                 self.slots, lane)  # fmt: skip
            call(kernels.store_value, value.copy(), v_at, self.itemsize, self.width, head_dim, lane)


def attend(q: np.ndarray, head: Head, seen: int) -> np.ndarray:
    """q [queries, E] over a head -> [queries, E]."""
    queries, head_dim = q.shape
    outs = []
    for cold in (False, True):
        out, scratch = np.zeros(q.shape, f32), np.full(1 << 16, np.nan, f32)
        over = kernels.over_float32 if head.itemsize == 4 else kernels.over_float16
        call(over, queries, q, head.table, 0, head.values_in, head.padded, head_dim, head.slots,
             head.width, seen, cold, head.table, 2 * cold, 0, out, scratch)  # fmt: skip
        outs.append(out)
    assert same_bits(*outs)
    return outs[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 26, 64, 80, 128, 256])
@pytest.mark.parametrize("seen", [1, 2, 3, 15, 16, 17, 33, 48, 100, 129])
def test_attend(head_dim: int, seen: int, kind: str) -> None:
    k, v = random(seen, head_dim, seed=1), random(seen, head_dim, seed=2)
    k[0, 0], v[-1, -1] = 1e6, -1e-7  # beyond float16 at both ends
    # What an abandoned text left behind the last position must not matter, a number or not.
    head = Head(k, v, np.nan, kind)
    if kind == "float16":
        k, v = half(k).astype(f32), half(v).astype(f32)
    for queries in (1, 2, 4):
        q = random(queries, head_dim)
        expected = attention(q[None], k[:, None], v[:, None])[0]
        assert same_bits(expected.reshape(q.shape), attend(q, head, seen))


def test_equal_scores_and_negative_zero_values() -> None:
    head_dim, seen = 4, 5
    k = random(seen, head_dim)
    head = Head(k, np.full(k.shape, -0.0, f32))
    out = attend(np.zeros((1, head_dim), f32), head, seen)
    assert same_bits(np.zeros((1, head_dim), f32), out)  # + 0.0 of SPEC 2.3: no negative zero


@pytest.mark.parametrize("kind", KINDS)
def test_cache_shows_what_was_stored(kind: str) -> None:
    config = small_twin("bitskip-v1").replace(head_dim=6)
    cache = KVCache(config, kind)
    keys = random(20, config.num_key_value_heads, 6)
    for h in range(config.num_key_value_heads):
        for position in range(20):
            row = keys[position, h].copy()
            page, lane = divmod(position, LANES)
            at = cache.pages.parts(page, 3)[2, h]
            size, v_at = cache.pages.kind.itemsize, at[cache.pages.values :]
            call(kernels.store_key, row, at, size, 8, 6, key_slots(8), lane)
            call(kernels.store_value, row, v_at, size, 16, 6, lane)
    cache.length = 20
    for found in cache.layer(2):
        assert same_bits(keys.astype(kind), found)


def test_smaller_caches_take_less_memory() -> None:
    config = small_twin("bitskip-v1").replace(head_dim=64)
    full, half, quarter = (KVCache(config, kind).pages.memory.nbytes for kind in KV_CACHES)
    assert 2 * half == full and quarter <= full / 4 * 1.1
    with pytest.raises(ValueError, match=r"KV cache 'int4': must be float32 or float16 or int8"):
        KVCache(config, "int4")
