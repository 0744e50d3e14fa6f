"""Every test runs with canaries around what kernels write (bitskip_cpu.aligned)."""

from __future__ import annotations

import os

os.environ.setdefault("BITSKIP_CHECK", "1")  # before anything is imported
