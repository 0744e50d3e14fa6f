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
from dataclasses import dataclass, replace

import llvmlite.binding as llvm

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "") not in ("", "0")
"""Whether the kernels run as plain Python."""

ARM64 = platform.machine().lower() in ("aarch64", "arm64")
"""Whether this is an ARM process of 64 bits; some feature names mean something else elsewhere."""

NEVER = 1 << 30  # tokens: more than there ever are


@dataclass(frozen=True)
class Fetch:
    """How a kind of CPU wants to be asked for weights before their use; all figures measured.

    `ternary` and `codes` (rows of 8, 6 and 4 bits) say how many bytes ahead a line is asked for in
    the second cache, and in the first (0: not at all).
    """

    name: str = ""
    ternary: tuple[int, int] = (8192, 1280)
    words: tuple[int, int] | None = None  # ternary tiles by words (`Path.dense`), where otherwise
    codes: tuple[int, int] = (8192, 1280)
    sparse: bool = False  # of codes one line in eight: the CPU's own prefetch needs but a hint
    halves: bool = False  # one token's products read both halves of their rows in turns
    scattered: int = 2  # the cache in which rows and pages that lie here and there are asked for


FETCHES = {
    "": Fetch(),  # any other CPU; tuned on Intel's, Cascade Lake reads at half the speed without
    "znver": Fetch("zen", ternary=(12288, 1280), codes=(8192, 0), sparse=True),
    "znver3": Fetch("zen3", ternary=(0, 2048), codes=(0, 1024), halves=True),
    "znver5": Fetch("zen5", ternary=(0, 16384), words=(8192, 0), codes=(8192, 0), scattered=1),
}
"""By how LLVM's name of a CPU begins; the longest that fits."""


@dataclass(frozen=True)
class Path:
    """An instruction set: what a CPU needs for it, and what its layouts and kernels ask.

    Adding one is a record in PATHS and, where its product of bytes is new, a function in
    `kernels/products/dot.py`. Thresholds were measured.
    """

    name: str
    needs: tuple[str, ...]  # features of the CPU, by LLVM's names
    kernels: str = "simd"  # its module in `kernels/products`: which kernel serves how many tokens
    dot: str = "vpdpbusd"  # the function in `dot.py` that multiplies bytes
    width: int = 64  # bytes of a vector register
    dense: int = 0  # ternary digits are looked up by bytes (8: 1.69 bits a weight), by words (16:
    # 1.78), or not at all (0: 2 bits)
    pairs: bool = False  # products are summed in 16 bits first: two of 127 * 127 must fit
    signed_bytes: bool = False  # the vocabulary's 8-bit rows are not stored with 128 added
    panel: tuple[int, int] = (4, 4)  # unpacked tiles x tokens whose sums fit the registers
    columns: int = 4  # unpacked rows are padded to a multiple of so many
    unpack_above: int = 16  # with more tokens, ternary tiles are unpacked before products
    bytes_above: int = 4  # with more tokens, the vocabulary's 8-bit rows count as unpacked tiles
    fetch: Fetch = Fetch()  # put there by `tuned`
    matrix_unit: bool = False  # whether there is one (AMX)
    few_above: tuple[int, int] = (NEVER, NEVER)  # with more, it takes packed tiles (amx.py)
    accumulators: int = 0  # sums that hide `dot`'s latency when `bench` takes its peak; 0: none

    @property
    def compiled(self) -> bool:
        """Whether its kernels are LLVM code; else plain loops, which can also be interpreted."""
        return self.kernels != "plain"


_VNNI512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
_VBMI512 = (*_VNNI512, "avx512vbmi")

PATHS = [
    Path("amx512", (*_VBMI512, "amx-tile", "amx-int8"), kernels="amx", dense=8, columns=64,
         matrix_unit=True, few_above=(2, 4), accumulators=4),
    Path("vbmi512", _VBMI512, dense=8, bytes_above=16, accumulators=20),
    Path("vnni512", _VNNI512, dense=16, bytes_above=16, accumulators=20),
    # More accumulators would not fit the 16 registers of the next two.
    Path("vnni256", ("avx2", "avxvnni"), width=32, panel=(1, 4), accumulators=13),
    Path("avx2", ("avx2",), dot="vpmaddubsw", width=32, pairs=True, signed_bytes=True,
         panel=(1, 4), unpack_above=7, bytes_above=NEVER, accumulators=12),
    Path("dotprod", ("dotprod",), dot="sdot", width=16, signed_bytes=True, panel=(1, 6),
         accumulators=16),
    Path("plain", (), kernels="plain", panel=(1, 4), bytes_above=NEVER),
]  # fmt: skip
"""Best first."""

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


def converts_float16() -> bool:
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
    if name != cpu_name() or not _features(name, listed).issuperset(PATH.needs):
        raise IsaError(
            f"Numba compiles for {name}, which the path {PATH.name} is not for: give it "
            "NUMBA_CPU_NAME and NUMBA_CPU_FEATURES in the environment, or set BITSKIP_ISA=plain"
        )


def available_paths() -> tuple[Path, ...]:
    """The paths that can run here, best first; interpreted (NUMBA_DISABLE_JIT=1), plain loops."""
    if INTERPRETED:
        return tuple(path for path in PATHS if not path.compiled)
    features = cpu_features()
    if not tiles_permitted():
        features -= {"amx-tile"}
    if not ARM64:
        features -= {"dotprod"}
    return tuple(path for path in PATHS if features.issuperset(path.needs))


def tiles_permitted() -> bool:
    """Ask Linux for the matrix unit's registers, which a process may not use unasked."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def tuned(path: Path, cpu: str) -> Path:
    """The path for a CPU of that LLVM name, asked for weights ahead as its kind wants it."""
    return replace(path, fetch=FETCHES[max(filter(cpu.startswith, FETCHES), key=len)])


def choose_path(wanted: str | None = None) -> Path:
    """The best available path, or the one so named. Raises IsaError where that cannot run."""
    cpu = llvm.get_host_cpu_name()  # what runs it, whatever it is compiled for
    available = {path.name: tuned(path, cpu) for path in available_paths()}
    if not wanted:
        return next(iter(available.values()))
    if wanted in available:
        return available[wanted]
    names = [path.name for path in PATHS]
    if wanted not in names:
        raise IsaError(f"BITSKIP_ISA={wanted}: unknown; one of {', '.join(names)}")
    raise IsaError(f"BITSKIP_ISA={wanted}: not possible here; choose {', '.join(available)}")


PATH = choose_path(os.environ.get("BITSKIP_ISA"))
"""The path of this process."""
