"""How sure a prediction is of itself (SPEC 8.5)."""

from __future__ import annotations

import numpy as np

from bitskip_ref.arithmetic.functions import exp, log
from bitskip_ref.arithmetic.sums import feature_sum
from bitskip_ref.constants import MEASURES

f32 = np.float32


def confidence(z: np.ndarray) -> dict[str, np.float32]:
    """Logits f32 [V] -> `max`, `margin` and `entropy`, each in 0..1 up to rounding, or all NaN."""
    if not np.isfinite(z.max()):
        return dict.fromkeys(MEASURES, f32(np.nan))  # SPEC 9.5
    d = z - z.max()
    e = exp(d)
    total = feature_sum(e)
    most = f32(f32(1.0) / total)
    if len(z) == 1:
        return {"max": most, "margin": f32(1.0), "entropy": f32(1.0)}
    second = exp(np.partition(d, -2)[-2])
    entropy = log(total) - feature_sum(e * d) / total
    return {
        "max": most,
        "margin": f32((f32(1.0) - second) / total),
        "entropy": f32(f32(1.0) - entropy / log(np.array(len(z), f32))),
    }
