"""Time from the command line to the first token: compiling (cold) and with compiled kernels (warm).

    python benchmarks/start.py [-r 5] [MODEL]

Each run is a process of its own, `bitskip-cpu generate --max-tokens 1`. The cold run uses an empty
kernel cache. Beside the warm runs stand, measured in turn, the time of `import numba` alone, which
the warm ones do not need, and that of NumPy and LLVM, which they do. Python may keep its bytecode.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time


def wall(command: list[str], cache: str) -> float:
    """Seconds of a process that must succeed."""
    environment = {**os.environ, "BITSKIP_CACHE_DIR": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print one line for the cold run and the median, least and most of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or shipped name; default: shipped")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    options = parser.parse_args()
    generate = [sys.executable, "-m", "bitskip_cpu", "generate", "--max-tokens", "1"]
    generate += [options.model] if options.model else []
    commands = {"warm": generate}
    for modules in ("numba", "numpy, llvmlite.binding"):
        commands[f"import {modules}"] = [sys.executable, "-c", f"import {modules}"]
    with tempfile.TemporaryDirectory() as cache:
        print(f"cold, compiling: {wall(generate, cache):.2f} s")
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.repetitions):
            for name, command in commands.items():
                times[name].append(wall(command, cache))
    for name, samples in times.items():
        middle = statistics.median(samples)
        print(f"{name}: median {middle:.2f} s ({min(samples):.2f} to {max(samples):.2f})")


if __name__ == "__main__":
    main()
