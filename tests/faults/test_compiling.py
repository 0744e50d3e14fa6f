"""A real compilation killed: what was kept is whole, the second process ends, a rerun works."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bitskip_cpu import beside, isa
from bitskip_ref.files import unfinished
from tests.faults.verbs import _kernels

if isa.INTERPRETED or not hasattr(os, "fork") or not beside.possible():
    pytest.skip("nothing is compiled by two processes", allow_module_level=True)

PIECES = ["repack", "code_rows"]  # the quickest two
COMPILE = f"""
from bitskip_cpu import shipped
shipped.code = lambda name: None
from bitskip_cpu.compiling import KERNELS
KERNELS.prepare({PIECES!r})
"""
PATIENCE = 240.0


class Compilation:
    """A process that compiles PIECES into a folder of its own, beside a second one."""

    def __init__(self, place: Path) -> None:
        self.temporary = place / "tmp"
        self.temporary.mkdir(exist_ok=True)
        environment = {
            **os.environ, "BITSKIP_CACHE_DIR": str(place / "kernels"),
            "TMPDIR": str(self.temporary),
        }  # fmt: skip
        self.process = subprocess.Popen([sys.executable, "-c", COMPILE], env=environment)

    def begun(self) -> bool:
        """Whether the second process has taken a piece."""
        return any(self.temporary.glob("bitskip-*/*.begun"))

    def gone(self) -> bool:
        """Whether neither process nor what they shared is there."""
        return self.process.poll() is not None and not any(self.temporary.glob("bitskip-*"))


def until(true: object) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if true():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def case(place: Path, number: signal.Signals, wait: float) -> None:
    """Kill one some seconds after its second process began; then compile again."""
    first = Compilation(place)
    assert until(lambda: first.begun() or first.process.poll() is not None)
    time.sleep(wait)
    first.process.send_signal(number)
    assert first.process.wait(PATIENCE) in (0, -number, 128 + number, 1)
    assert until(first.gone), list(first.temporary.rglob("*"))
    kept = _kernels(place)
    again = Compilation(place)
    assert again.process.wait(PATIENCE) == 0
    found = _kernels(place)
    assert found.keys() == set(PIECES) and kept.items() <= found.items()
    assert not [p for p in place.rglob("*") if unfinished(p.name)]


def test_a_killed_compilation_leaves_nobody_behind(tmp_path: Path) -> None:
    """SIGKILL: the second process finds that nobody hears it, and takes the folder away."""
    case(tmp_path, signal.SIGKILL, 0.0)


@pytest.mark.slow
def test_compilations_killed_at_random() -> None:
    draw = random.Random(14)
    for _ in range(10):
        with tempfile.TemporaryDirectory() as place:
            number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            case(Path(place), number, draw.uniform(0, 3))
