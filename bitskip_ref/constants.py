"""Constants of the definition (SPEC 2, 4, 6, 8), stated once; engines share them alone.

Each number is written as in SPEC; an engine rounds it to f32 before use (SPEC 2.1).
"""

from __future__ import annotations

# exp (SPEC 2.6) and log (SPEC 2.9): coefficients from the highest power down, as Horner takes them.
EXP_MIN, EXP_MAX = -87.0, 88.0
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_COEFFICIENTS = (
    1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 5.00000012e-1,
)  # fmt: skip
SQRT_HALF = 0.707106781
LOG_COEFFICIENTS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip

SCALE_FLOOR = 1e-5
"""The least scale of a quantizer (SPEC 4.1, 4.2): nothing is divided by zero."""

LARGEST_HALF = 65504.0
"""The largest magnitude in a float16 cache (SPEC 6.5): float16's largest finite number."""

KV_CACHES = ("float32", "float16", "int8")
"""What the numbers of a cache may be (SPEC 6.5, 6.8)."""

LARGEST_WEIGHT = 16383
"""The largest code of a softmax weight over an int8 cache (SPEC 6.8): two times 7 bits."""

SOFTMAX_UNIT = 65536
"""What an exponential of 1 counts in the denominator over an int8 cache (SPEC 6.8)."""

INT8_CACHE_POSITIONS = 131072
"""The longest context that an int8 cache may have (SPEC 6.8)."""

MEASURES = ("max", "margin", "entropy")
"""What is measured of how sure a prediction is (SPEC 8.5)."""
