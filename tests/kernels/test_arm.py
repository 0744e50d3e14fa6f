"""The path `dotprod` without an ARM machine: its instructions, and its sums under emulation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from bitskip_cpu import isa
from tests.kernels import arm

ROOT = Path(__file__).parent.parent.parent
FUSED = re.compile(r"\s(fmla|fmls|f?n?madd|fn?msub)\s+[vsd]")
DOTS = {*arm.TERNARY, *arm.VOCAB, *arm.CACHE, "bytes_panel"}

try:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.Target.from_triple(arm.TRIPLE)
except RuntimeError:
    pytest.skip("this LLVM cannot generate code for ARM", allow_module_level=True)
if isa.INTERPRETED:
    pytest.skip("nothing is compiled", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("arm")
    command = [sys.executable, "-m", "tests.kernels.arm", str(made)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300, env=os.environ)
    return made


def test_instructions(folder: Path) -> None:
    """Dot products where there are products of codes; no multiply-add in one rounding anywhere."""
    names = json.loads((folder / "kernels.json").read_text())
    assert set(names) > DOTS
    for name in names:
        assembly = (folder / f"{name}.s").read_text()
        assert ("\tsdot\t" in assembly) == (name in DOTS), name
        assert not FUSED.search(assembly), name
        assert not re.search(r"\sbl\s+__", assembly), name  # a function for each float16
    assert "\tfcvtl\t" in (folder / "weigh_page.s").read_text()
    for name in arm.FLOATS:
        assert "\tfmul\t" in (folder / f"{name}.s").read_text(), name


def test_fused_instructions_would_be_seen(tmp_path: Path) -> None:
    for kind in ("float", "double", "<4 x float>"):
        text = f"""
        define {kind} @f({kind} %a, {kind} %b, {kind} %c) {{
          %p = fmul contract {kind} %a, %b
          %s = fadd contract {kind} %p, %c
          ret {kind} %s
        }}"""
        for name, source in (("fused", text), ("apart", text.replace("contract", ""))):
            arm.for_arm(llvm.parse_assembly(source), tmp_path, name)
            found = FUSED.search((tmp_path / f"{name}.s").read_text())
            assert bool(found) == (name == "fused"), kind


def test_sums_under_emulation(folder: Path) -> None:
    gcc = shutil.which("aarch64-linux-gnu-gcc")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not gcc or not qemu:
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user")
    objects = [str(folder / f"{n}.o") for n in json.loads((folder / "kernels.json").read_text())]
    program = str(folder / "program")
    subprocess.run([gcc, "-static", "-o", program, str(folder / "main.c"), *objects], check=True)
    for planted in ([], ["a wrong sum"]):
        done = subprocess.run(
            [qemu, "-cpu", "max", program, *planted], capture_output=True, text=True, timeout=300
        )
        assert done.stdout.split() == (["packed_1", "compared"] if planted else ["compared"])
