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


def key_memory(keys: np.ndarray, capacity: int, behind: float, kind: str) -> np.ndarray:
    """keys f32 [S, E] in the cache's layout, other positions filled."""
    head_dim = keys.shape[1]
    padded = padded_keys(head_dim)
    memory = np.full((capacity // LANES, padded, LANES), behind, kind)
    slots = key_slots(padded)
    memory[:, slots[head_dim:]] = 0
    for position, key in enumerate(keys):
        row = np.ascontiguousarray(key)
        call(kernels.store_key, row, memory, memory.itemsize, padded, head_dim, slots, position)
    return memory


def value_memory(values: np.ndarray, capacity: int, behind: float, kind: str) -> np.ndarray:
    """The same of values."""
    head_dim = values.shape[1]
    memory = np.full((capacity, padded_values(head_dim)), behind, kind)
    for position, value in enumerate(values):
        row = np.ascontiguousarray(value)
        call(kernels.store_value, row, memory, memory.itemsize, memory.shape[1], head_dim, position)
    return memory


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: int) -> np.ndarray:
    """q [queries, E], memory as in the cache -> [queries, E]."""
    queries, head_dim = q.shape
    outs = []
    for cold in (False, True):
        out, scratch = np.zeros(q.shape, f32), np.full(1 << 16, np.nan, f32)
        call(kernels.attend, queries, q, keys, values, keys.itemsize, keys.shape[1], head_dim,
             key_slots(keys.shape[1]), values.shape[1], seen, cold, out, scratch)  # fmt: skip
        outs.append(out)
    assert same_bits(*outs)
    return outs[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 26, 64, 80, 128, 256])
@pytest.mark.parametrize("seen", [1, 2, 3, 15, 16, 17, 33, 48, 100, 129])
def test_attend(head_dim: int, seen: int, kind: str) -> None:
    k, v = random(seen, head_dim, seed=1), random(seen, head_dim, seed=2)
    k[0, 0], v[-1, -1] = 1e6, -1e-7  # beyond float16 at both ends
    capacity = -(-seen // LANES) * LANES
    # What an abandoned text left behind the last position must not matter.
    keys, values = key_memory(k, capacity, 3e4, kind), value_memory(v, capacity, -3e4, kind)
    if kind == "float16":
        k, v = half(k).astype(f32), half(v).astype(f32)
    for queries in (1, 2, 4):
        q = random(queries, head_dim)
        expected = attention(q[None], k[:, None], v[:, None])[0]
        assert same_bits(expected.reshape(q.shape), attend(q, keys, values, seen))


def test_equal_scores_and_negative_zero_values() -> None:
    head_dim, seen = 4, 5
    k = random(seen, head_dim)
    values = np.full((LANES, LANES), -0.0, f32)
    out = attend(np.zeros((1, head_dim), f32), key_memory(k, LANES, 0.0, "float32"), values, seen)
    assert same_bits(np.zeros((1, head_dim), f32), out)  # + 0.0 of SPEC 2.3: no negative zero


@pytest.mark.parametrize("kind", KINDS)
def test_cache_shows_what_was_stored(kind: str) -> None:
    config = small_twin("bitskip-v1").replace(head_dim=6)
    cache = KVCache(config, kind)
    keys = random(20, config.num_key_value_heads, 6)
    for h in range(config.num_key_value_heads):
        for position in range(20):
            row = keys[position, h].copy()
            shape = cache.keys.itemsize, 8, 6, key_slots(8)
            call(kernels.store_key, row, cache.keys[2, h], *shape, position)
        cache.values[2, h, :20, :6] = keys[:, h]
    cache.length = 20
    for found in cache.layer(2):
        assert same_bits(keys.astype(kind), found)


def test_float16_takes_half_the_memory() -> None:
    full, small = (KVCache(small_twin("bitskip-v1"), kind) for kind in KINDS)
    for name in ("keys", "values"):
        assert 2 * getattr(small, name).nbytes == getattr(full, name).nbytes
    with pytest.raises(ValueError, match=r"KV cache 'int8': must be float32 or float16"):
        KVCache(small_twin("bitskip-v1"), "int8")
