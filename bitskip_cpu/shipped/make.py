"""Make the object code that wheels carry: `python -m bitskip_cpu.shipped.make [SET ...]`.

    python -m bitskip_cpu.shipped.make && python -m build --wheel

It needs Numba, and Linux on x86-64, whose LLVM writes the code for ARM, too; none of the CPUs that
the code is for. A set is the code of one instruction-set path, tuned for a kind of CPU
(`isa.FETCHES`); without names all are made. Each is made in a process of its own, as a path is
chosen before any kernel is declared.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from bitskip_cpu import isa, shipped, sources
from bitskip_cpu.compiling import ARGUMENTS
from bitskip_cpu.cores import usable_cores
from bitskip_ref.files import replace_file

ARM_TRIPLE = "aarch64-unknown-linux-gnu"
# Beside what a path needs: what every CPU with it has.
ALSO = ("f16c", "bmi", "bmi2", "lzcnt")
ALSO_512 = (*ALSO, "avx512dq")


TAKEN = {"znver": ("vbmi512", "avx2"), "znver3": ("avx2",), "znver5": ("vbmi512",)}
"""The paths that a kind of CPU takes unasked; another may take any."""

SETS = {
    shipped.set_name("aarch64" if "dotprod" in path.needs else "x86_64", tuned): tuned
    for path in isa.PATHS
    if path.compiled
    for cpu in isa.FETCHES
    if path.name in TAKEN.get(cpu, (path.name,))
    for tuned in [isa.tuned(path, cpu)]
}


def features(path: isa.Path) -> tuple[str, ...]:
    """What the code of a path may use, by LLVM's names, beyond what its architecture has."""
    if "dotprod" in path.needs:
        return path.needs
    return (*path.needs, *(ALSO_512 if path.width == 64 else ALSO))


def make(name: str) -> dict[str, Any]:
    """Write a set's object files from a process of its own; its entry in the manifest."""
    path = SETS[name]
    arm = "dotprod" in path.needs
    # For ARM, Numba's optimizer sees vectors of ARM's width: those of the oldest x86-64.
    allowed = "" if arm else ",".join(f"+{f}" for f in features(path))
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": allowed}
    environment.pop("BITSKIP_ISA", None)
    code = f"from bitskip_cpu.shipped.make import write; write({name!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    print(name, file=sys.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def write(name: str) -> None:
    """Compile a set's kernels, in this process, and print its entry in the manifest."""
    isa.PATH = SETS[name]
    isa.ARM64 = "dotprod" in isa.PATH.needs
    import numba

    from bitskip_cpu.kernels import object_code

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    files = {}
    for kernel, arguments in ARGUMENTS.items():
        if isa.ARM64:
            module = object_code.module(kernel, arguments)
            code = bytes(arm_machine(module).emit_object(module))
        else:
            code = object_code.machine_code(kernel, arguments, lambda _: None)
        with replace_file(shipped.FOLDER / f"{name}-{kernel}.o") as file:
            file.write(code)
        files[kernel] = hashlib.sha256(code).hexdigest()
    version = ".".join(map(str, llvm.llvm_version_info))
    entry = {
        "features": features(isa.PATH),
        "sources": sources.digest(),
        "made_by": f"numba {numba.__version__}, llvmlite {llvmlite.__version__}, LLVM {version}",
        "files": files,
    }
    print(json.dumps(entry))


def arm_machine(module: llvm.ModuleRef) -> llvm.TargetMachine:
    """Turn a module that was made for this machine into one for ARM, and what writes its code."""
    machine = llvm.Target.from_triple(ARM_TRIPLE).create_target_machine(
        cpu="generic", features="+dotprod", opt=3, codemodel="jitdefault", jit=True
    )
    module.triple, module.data_layout = ARM_TRIPLE, str(machine.target_data)
    return machine


def main(names: list[str]) -> None:
    """Make sets; what was made before goes."""
    for old in [*shipped.FOLDER.glob("*.o"), *shipped.FOLDER.glob(shipped.MANIFEST)]:
        old.unlink()
    with ThreadPoolExecutor(usable_cores()) as pool:
        made = dict(zip(names, pool.map(make, names), strict=True))
    with replace_file(shipped.FOLDER / shipped.MANIFEST) as file:
        file.write(json.dumps(made, indent=1).encode())


if __name__ == "__main__":
    main(sys.argv[1:] or list(SETS))
