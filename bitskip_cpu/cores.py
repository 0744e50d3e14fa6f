"""How many cores there are to use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Physical cores that this process may use, container limits included; at least 1."""
    logical = os.cpu_count() or 1
    allowed = set(range(logical))
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:  # not Linux, or hidden: trust the totals
            cores.clear()
            break
    count = len(cores)
    if not count:
        import psutil

        count = min(len(allowed), psutil.cpu_count(logical=False) or logical)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        pass
    return max(1, count)
