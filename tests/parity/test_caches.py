"""Copies of a cache in every engine: one past, two futures that do not meet (SPEC 12.3)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bitskip_cpu.engine
from bitskip_ref.cache import CacheFill, cached_arrays
from bitskip_ref.config import small_twin
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.exits import ConfidenceExit, FixedExit
from tests.helpers import random_tensors, random_tokens
from tests.parity.engines import ENGINES, make

CONFIG = small_twin("bitskip-v3").replace(
    max_position_embeddings=35,
    num_hidden_layers=3,  # positions: no multiple of 16
)
TENSORS = random_tensors(CONFIG)
IDS = random_tokens(CONFIG, 35)


COPIES: dict[str, Callable[[Any], Any]] = {
    "fork": lambda cache: cache.fork(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.fixture(scope="module", params=[(e, k) for e in ENGINES for k in KV_CACHES], ids=" ".join)
def engine(request: pytest.FixtureRequest) -> Any:
    name, kv_cache = request.param
    return make(name, CONFIG, TENSORS, kv_cache)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def test_what_a_block_holds_has_its_shape(engine: Any) -> None:
    """Also while it holds nothing yet, or nothing any more."""
    cache = engine.new_cache()
    for size in (0, 20, 17, 16, 1, 0):
        if size == 20:
            engine.extend(IDS[:20], cache)
        cache.length = size
        for i in range(CONFIG.num_hidden_layers):
            found = [(x.dtype, x.shape) for x in cache.layer(i)]
            kinds = cached_arrays(CONFIG, cache.kv_cache).values()
            assert found == [(np.dtype(kind), (size, *shape)) for kind, shape in kinds]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("size", [0, 15, 16, 34])
def test_a_copy_goes_on_alone(engine: Any, how: str, size: int) -> None:
    cache = engine.new_cache()
    if size:
        engine.extend(IDS[:size], cache)
    other = COPIES[how](cache)
    assert other.length == size and type(other) is type(cache)
    one = engine.extend(IDS[size : size + 1], cache)
    two = engine.extend([7], other)
    assert equal(one[-1], engine.logits(IDS[: size + 1])[-1])
    assert equal(two[-1], engine.logits([*IDS[:size], 7])[-1])
    if size < 34:  # each finds what it wrote itself, up to the end of the context
        for mine, ids in ((cache, IDS[: size + 1]), (other, [*IDS[:size], 7])):
            rest = IDS[size + 1 :]
            assert equal(engine.extend(rest, mine), engine.logits([*ids, *rest])[size + 1 :])
            assert mine.length == 35
            with pytest.raises(ValueError, match="exceed the context"):
                engine.extend([1], COPIES[how](mine))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_knows_how_far_its_blocks_are_filled(engine: Any, how: str) -> None:
    cache = engine.new_cache()
    engine.extend(IDS[:5], cache)
    engine.extend(IDS[5:9], cache, exit_layer=2)
    other = COPIES[how](cache)
    with pytest.raises(ValueError, match="filled at exit layer 2"):
        engine.extend([1], other)
    for mine in (other, cache):
        mine.length = 5  # a copy forgets as the original does
        assert equal(engine.extend(IDS[5:7], mine), engine.logits(IDS[:7])[5:])
    other.length = 7
    again = COPIES[how](cache)
    cache.length = 6
    assert again.length == 7
    assert equal(engine.extend([3], again)[0], engine.logits([*IDS[:7], 3])[7])


def test_any_length_that_is_set_is_noted_or_refused(engine: Any) -> None:
    """Also after one that no float can be compared with."""
    cache = engine.new_cache()
    engine.extend(IDS[:5], cache)
    for length in (10**400, np.float32(1), "5", 5.0, None, -1):
        cache.length = length
        with pytest.raises(ValueError, match=r"exit layer 0|cache length"):
            engine.extend([1], cache)


def test_a_shortened_cache_is_copied_short(engine: Any) -> None:
    cache = engine.new_cache()
    engine.extend(IDS[:20], cache)
    cache.length = 3
    for how in COPIES.values():
        other = how(cache)
        assert other.length == 3
        assert equal(engine.extend(IDS[3:6], other), engine.logits(IDS[:6])[3:])


def test_copies_are_as_small_as_what_they_hold() -> None:
    """Of a long context, a pickle carries the filled positions of the filled blocks alone."""
    config = CONFIG.replace(max_position_embeddings=4096)
    for name in ENGINES:
        engine = make(name, config, TENSORS)
        cache = engine.new_cache()
        empty = len(pickle.dumps(cache))
        engine.extend(IDS[:16], cache, exit_layer=1)
        one = len(pickle.dumps(cache)) - empty
        numbers = 16 * config.num_key_value_heads * 2 * 16 * 4  # keys and values, padded to 16
        assert empty < 2000 and one < numbers + 2000, name


def test_copies_serve_rules_and_rounds() -> None:
    """A copy is as good as the original for steps that stop on the way, and for speculation."""
    for name in ("reference", "numba", "torch"):
        engine = make(name, CONFIG, TENSORS)
        cache = engine.new_cache()
        engine.extend(IDS[:10], cache)
        for rule in (ConfidenceExit(0.02), FixedExit(2)):
            copies = cache.fork(), pickle.loads(pickle.dumps(cache))
            a, b = (engine.step(5, c, rule) for c in copies)
            assert equal(a[0], b[0]) and a[1] == b[1]
        a, b = (engine.speculate(5, c, 3, Draft(1)) for c in (cache.fork(), copy.deepcopy(cache)))
        assert a[0] == b[0] and equal(a[1], b[1])


def test_kept_addresses_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that was: a copy made of the attributes points to the original's memory."""
    kind = bitskip_cpu.engine.KVCache

    def shallow(self: Any) -> Any:
        other = kind.__new__(kind)
        other.__dict__.update(self.__dict__)
        other.turn = type(self.turn)()
        other._filled = list(self._filled)
        return other

    monkeypatch.setattr(CacheFill, "fork", shallow)
    engine = make("numba", CONFIG, TENSORS)
    with pytest.raises(AssertionError):
        test_a_copy_goes_on_alone(engine, "fork", 17)


def test_a_cache_in_use_is_not_copied() -> None:
    engine = make("reference", CONFIG, TENSORS)
    cache = engine.new_cache()
    for how in COPIES.values():
        with pytest.raises(RuntimeError, match="in the middle of a call"):
            engine.extend([1], cache, trace=lambda *_, how=how: how(cache))
    assert cache.length == 0
