"""What this machine is, and how much memory this process took."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from bitskip_cpu.cores import usable_cores

PACKAGES = ("bitskip", "numpy", "numba", "llvmlite", "tokenizers", "click")


def versions() -> dict[str, str | None]:
    """Package -> version; None for one that is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def fingerprint() -> dict[str, Any]:
    """The machine and the versions, for a result that is to be compared later."""
    import psutil

    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(psutil.getloadavg()),  # over 1, 5 and 15 minutes: was it alone?
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions(),
    }


def peak_rss_bytes() -> int:
    """The most memory this process has held at once."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
