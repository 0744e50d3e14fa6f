"""Freed memory is kept for the next step."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from bitskip_train.memory import keep_freed_memory
print(int(keep_freed_memory()))
for _ in range(3):
    np.ones(1 << 23)  # 64 MiB, above glibc's own limit for reuse
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    """Whether settings were made, and page faults of ten buffers."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    changed, count = map(int, done.stdout.split())
    return bool(changed), count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_used_again_unless_the_user_decides() -> None:
    changed, count = faults(OMP_NUM_THREADS="1")
    if not changed:
        pytest.skip("not glibc")
    untouched, many = faults(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
    assert not untouched
    assert count < 100 < many
