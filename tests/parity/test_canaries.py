"""BITSKIP_CHECK=1: a kernel that writes outside its arrays is seen after the call."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from bitskip_cpu.aligned import CHECK, aligned, check_canaries
from bitskip_cpu.engine import Engine
from bitskip_cpu.kernels.layout import BLOCKS, EMBED
from tests.helpers import random_tensors, twin

CONFIG = twin("bitskip-v1")
pytestmark = pytest.mark.skipif(not CHECK, reason="BITSKIP_CHECK=0")


@pytest.mark.parametrize("at", [-1, 0])
def test_a_byte_outside_is_seen(at: int) -> None:
    array = aligned((3, 5), np.float32)
    raw = array.base
    while raw.base is not None:
        raw = raw.base
    outside = array.ctypes.data - raw.ctypes.data + (array.nbytes if at == 0 else at)
    before = raw[outside]
    check_canaries()
    raw[outside] = 0
    with pytest.raises(RuntimeError, match=r"wrote (before|behind) an array of 60 bytes"):
        check_canaries()
    raw[outside] = before
    check_canaries()


def test_a_kernel_that_writes_behind_the_cache_is_seen() -> None:
    """Planted: a table that names a page which lies partly behind the memory."""
    engine = Engine(CONFIG, random_tensors(CONFIG), 1)
    cache = engine.new_cache()
    engine.extend([1, 2], cache)
    memory, part = cache.pages.memory, cache.pages.parts(0, CONFIG.num_hidden_layers)
    cache.table[0] = memory.ctypes.data + memory.nbytes - part.nbytes + 64
    space = engine._space
    space.set_tokens([1], cache, 15)
    with pytest.raises(RuntimeError, match="wrote behind an array"):
        engine._call(EMBED | BLOCKS, 0, CONFIG.num_hidden_layers)
    del engine, space, cache, memory, part
    gc.collect()
    check_canaries()


def test_it_is_off_unless_asked_for() -> None:
    code = "from bitskip_cpu import aligned as a; print(a.CHECK, a.GUARD)"
    environment = {k: v for k, v in os.environ.items() if k != "BITSKIP_CHECK"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["False", "0"], done.stderr
