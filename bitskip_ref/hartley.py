"""The table of the rotation that needs no padding (SPEC 5.3): every engine's comes from here."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bitskip_ref.rope import TWO_PI, sine_cosine


@lru_cache(maxsize=32)
def hartley(m: int) -> np.ndarray:
    """c[i, j] = cos a + sin a with a = 2 pi (i j mod m) / m, f32 [m, m], read-only."""
    i = np.arange(m)
    sine, cosine = sine_cosine((TWO_PI * (np.outer(i, i) % m)) / m)
    table = (cosine + sine).astype(np.float32)
    table.setflags(write=False)
    return table
