"""Every instruction-set path that this machine can run or emulate has the reference's bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitskip_cpu import isa
from tests.parity.added_path import ADDED as ADDED_PATHS

ROOT = Path(__file__).parent.parent.parent

# Environment that leads to a path, and what it runs. The first two compile for other CPUs.
X86 = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "plain": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
    "vnni256": {"BITSKIP_ISA": "vnni256"},
    "vnni512": {"BITSKIP_ISA": "vnni512"},  # its weights lie as on no other path
}
COMPILED = ["extreme", "wide", "wide-hadamard", "wt2-bitskip", "bitskip-v2", "bitnet-2b4t",
            "layerskip", "float16-head", "bfloat16-head", "per-layer-exits", "smallest",
            "long:float16", "wide:float16", "bitnet-2b4t:float16", "long:int8", "wide:int8",
            "extreme:int8", "int8", "wide-floats"]  # fmt: skip
INTERPRETED = ["smallest", "smallest:float16", "smallest:int8", "pages", "pages:int8"]
HALVES = ["extreme", "wide", "wide-hadamard", "wide:int8", "bitnet-2b4t", "int8", "int6-head",
          "int4-head", "biases", "wide-floats", "float16-head", "smallest"]  # fmt: skip
ADDED = {  # paths of `added_path`: environment, what they run
    "halves-vbmi512": ({}, HALVES),
    "halves-vnni512": ({}, ["extreme", "wide"]),
    "halves-avx2": ({}, HALVES),
    "halves-plain": ({}, ["wide", "int8", "int4-head"]),
    "narrow": ({}, ["extreme", "wide", "bitnet-2b4t", "layerskip"]),
    "widening": ({}, ["extreme", "wide", "bitnet-2b4t", "layerskip", "wide:int8"]),
    "eager": ({"NUMBA_DISABLE_JIT": "1"}, ["smallest"]),
}  # fmt: skip


def start(
    environment: dict[str, str], names: list[str], module: str = "engine_check"
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.parity.{module}", *names],
        env=os.environ | environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process per path, side by side: most of the time goes into compiling."""
    possible = {path.name for path in isa.available_paths()}
    found = {path: start(X86[path], COMPILED) for path in X86 if path in possible}
    found["interpreted"] = start({"NUMBA_DISABLE_JIT": "1"}, INTERPRETED)
    features = isa.cpu_features()
    for path in ADDED_PATHS:
        if features.issuperset(path.needs):
            environment, names = ADDED[path.name]
            found[path.name] = start(environment, [path.name, *names], "added_path")
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


@pytest.mark.parametrize("name", ADDED)
def test_an_added_path(processes: dict[str, subprocess.Popen[str]], name: str) -> None:
    """An instruction set is one record and, where needed, one `dot`."""
    if name not in processes:
        pytest.skip(f"this machine cannot run {name}")
    out, errors = processes[name].communicate()
    assert processes[name].returncode == 0, errors
    report = json.loads(out)
    assert report["path"] == name and set(report["problems"]) == set(ADDED[name][1])
    assert not any(report["problems"].values()), report["problems"]
