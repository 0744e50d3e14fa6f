"""Which instruction-set path this process runs: chosen once, before any kernel is declared.

An LLVM intrinsic that the target lacks aborts the process, so the choice follows what Numba will
compile for (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included), not what the CPU could do. Numba is
not imported here: compiled kernels run without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

import llvmlite.binding as llvm

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "") not in ("", "0")
"""Whether the kernels run as plain Python."""

ARM64 = platform.machine().lower() in ("aarch64", "arm64")
"""Whether this is an ARM process of 64 bits; some feature names mean something else elsewhere."""

PATHS = ("amx512", "vbmi512", "vnni512", "vnni256", "avx2", "dotprod", "plain")  # best first

_VBMI512 = {"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi"}
NEEDS = {
    "amx512": _VBMI512 | {"amx-tile", "amx-int8"},
    "vbmi512": _VBMI512,
    "vnni512": {"avx512f", "avx512bw", "avx512vl", "avx512vnni"},
    "vnni256": {"avx2", "avxvnni"},
    "avx2": {"avx2"},
    "dotprod": {"dotprod"},
    "plain": set(),
}

# What a CPU name given in NUMBA_CPU_NAME implies beyond the feature list; others imply nothing.
_AVX2 = {"avx2", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl"}
_IMPLIED = {
    "haswell": _AVX2,
    "broadwell": _AVX2,
    "skylake": _AVX2,
    "x86-64-v3": _AVX2,
    "znver1": _AVX2,
    "znver2": _AVX2,
    "znver3": _AVX2,
    "alderlake": _AVX2 | {"avxvnni"},
    "skylake-avx512": _AVX512,
    "x86-64-v4": _AVX512,
    "cascadelake": _AVX512 | {"avx512vnni"},
    "icelake-server": _AVX512 | {"avx512vnni"},
    "sapphirerapids": _AVX512 | {"avx512vnni", "avxvnni"},
    "znver4": _AVX512 | {"avx512vnni"},
    "znver5": _AVX512 | {"avx512vnni", "avxvnni"},
    **{f"apple-m{n}": {"dotprod"} for n in range(1, 5)},
    **{f"neoverse-{n}": {"dotprod"} for n in ("n1", "n2", "v1", "v2", "e1")},
    **{f"cortex-{n}": {"dotprod"} for n in ("a55", "a75", "a76", "a77", "a78", "x1", "x2")},
}


class IsaError(RuntimeError):
    """BITSKIP_ISA asks for a path that is unknown or that this CPU cannot run."""


def cpu_name() -> str:
    """The LLVM CPU name that Numba compiles for."""
    return os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()


def cpu_features() -> frozenset[str]:
    """LLVM names of the features that Numba's code generator may use in this process."""
    listed = os.environ.get("NUMBA_CPU_FEATURES")
    if listed is None:
        named = os.environ.get("NUMBA_CPU_NAME", "")
        listed = "" if named.lower() == "generic" else _host_features()
    return _features(cpu_name(), listed)


def converts_halfs() -> bool:
    """Whether the CPU that Numba compiles for turns float16 into float32 by an instruction."""
    return ARM64 or "f16c" in cpu_features()


def _host_features() -> str:
    try:
        return llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell on this system; the CPU's name implies some
        return ""


def _features(name: str, listed: str) -> frozenset[str]:
    words = listed.split(",")
    implied = _IMPLIED.get(name, set())
    return frozenset(
        (implied | {w[1:] for w in words if w[:1] == "+"}) - {w[1:] for w in words if w[:1] == "-"}
    )


def check(name: str, listed: str) -> None:
    """Raise IsaError unless Numba's target, as it says itself, is what the path was chosen for."""
    if name != cpu_name() or not NEEDS[PATH] <= _features(name, listed):
        raise IsaError(
            f"Numba compiles for {name}, which the path {PATH} is not for: give it NUMBA_CPU_NAME "
            "and NUMBA_CPU_FEATURES in the environment alone, or set BITSKIP_ISA=plain"
        )


def available_paths() -> tuple[str, ...]:
    """The paths that can run here, best first. Interpreted (NUMBA_DISABLE_JIT=1): only `plain`."""
    if INTERPRETED:
        return ("plain",)
    features = cpu_features()
    if not tiles_permitted():
        features -= {"amx-tile"}
    if not ARM64:
        features -= {"dotprod"}
    return tuple(path for path in PATHS if NEEDS[path] <= features)


def tiles_permitted() -> bool:
    """Ask Linux for the matrix unit's registers, which a process may not use unasked."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def choose_path(wanted: str | None = None) -> str:
    """The best available path, or the wanted one. Raises IsaError where that cannot run."""
    available = available_paths()
    if not wanted:
        return available[0]
    if wanted not in PATHS:
        raise IsaError(f"BITSKIP_ISA={wanted}: unknown; one of {', '.join(PATHS)}")
    if wanted not in available:
        raise IsaError(f"BITSKIP_ISA={wanted}: not possible here; choose {', '.join(available)}")
    return wanted


PATH = choose_path(os.environ.get("BITSKIP_ISA"))
"""The path of this process."""
