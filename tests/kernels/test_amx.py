"""The path `amx512` without a matrix unit: its loops, interpreted, over an emulated one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("planted", ["", "adding"])
def test_loops_over_an_emulated_unit(planted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.emulated_amx", planted],
        cwd=ROOT, env=os.environ | {"NUMBA_DISABLE_JIT": "1", "BITSKIP_ISA": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if planted:
        assert "AssertionError: (820, 3, 17)" in done.stderr
    else:
        assert done.stdout.strip() == "30", done.stderr
