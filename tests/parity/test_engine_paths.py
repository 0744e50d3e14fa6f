"""Every instruction-set path that this machine can run or emulate has the reference's bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitskip_cpu.isa import available_paths

ROOT = Path(__file__).parent.parent.parent

# Environment that leads to a path, and what it runs. The first three compile for other CPUs.
X86 = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "plain": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
    "vnni256": {"BITSKIP_ISA": "vnni256"},
}
COMPILED = ["extreme", "wide", "wide-hadamard", "wt2-bitskip", "bitskip-v2", "bitnet-2b4t",
            "layerskip", "float16-head", "per-layer-exits", "smallest", "long:float16",
            "wide:float16", "bitnet-2b4t:float16"]  # fmt: skip
INTERPRETED = ["smallest", "smallest:float16"]


def start(environment: dict[str, str], names: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parity.engine_check", *names],
        env=os.environ | environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process per path, side by side: most of the time goes into compiling."""
    found = {path: start(X86[path], COMPILED) for path in X86 if path in available_paths()}
    found["interpreted"] = start({"NUMBA_DISABLE_JIT": "1"}, INTERPRETED)
    yield found
    for process in found.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", [*X86, "interpreted"])
def test_path(processes: dict[str, subprocess.Popen[str]], name: str) -> None:
    if name not in processes:
        pytest.skip(f"this machine cannot run {name}")
    out, errors = processes[name].communicate()
    assert processes[name].returncode == 0, errors
    report = json.loads(out)
    assert report["path"] == ("plain" if name == "interpreted" else name)
    assert set(report["problems"]) == set(INTERPRETED if name == "interpreted" else COMPILED)
    assert not any(report["problems"].values()), report["problems"]
