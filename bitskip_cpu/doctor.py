"""What this installation runs on, and what is wrong with it."""

from __future__ import annotations

import os
from typing import Any

from bitskip.tables import size
from bitskip_cpu import isa, models
from bitskip_cpu.compiling import ARGUMENTS, KERNELS, cache_refusal
from bitskip_cpu.cores import default_threads
from bitskip_cpu.machine import fingerprint
from bitskip_cpu.models import DEFAULT
from bitskip_ref.folder import read_folder
from bitskip_ref.tensors import FormatError
from bitskip_text.tokenizer import read_tokenizer


def doctor() -> dict[str, Any]:
    """Everything `bitskip-cpu doctor` prints.

    Keys: machine, isa, threads, cache, environment, memory_available_bytes, models, problems (one
    line each, with the remedy; empty if all is well). cache.lacking: the kernels that are still to
    be compiled, each when something needs it.
    """
    import psutil

    problems, lacking = [], KERNELS.lacking()
    if KERNELS.directory is None and not KERNELS.shipped:
        problems.append(
            f"kernels are compiled in every process: {cache_refusal()}: set BITSKIP_CACHE_DIR to a "
            "folder of yours"
        )
    shipped = [_check(name) for name in models.names()]
    problems += [f"model {m['name']}: {m['problem']}" for m in shipped if m["problem"]]
    if DEFAULT not in models.names():
        problems.append(f"the model {DEFAULT} is missing: verbs need a MODEL argument")
    return {
        "machine": fingerprint(),
        "isa": {
            "path": isa.PATH.name,
            "available": [path.name for path in isa.available_paths()],
            "cpu": isa.cpu_name(),
            "features": sorted(isa.cpu_features()),
        },
        "threads": default_threads(),
        "cache": {
            "folder": str(KERNELS.directory) if KERNELS.directory else None,
            "writable": KERNELS.directory is not None,
            "warm": not lacking,
            "lacking": lacking,
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if _concerns_us(k)},
        "memory_available_bytes": psutil.virtual_memory().available,
        "models": shipped,
        "problems": problems,
    }


def _readiness(lacking: list[str]) -> str:
    """How many kernels are compiled."""
    if not lacking:
        return "kernels are ready"
    if len(lacking) == len(ARGUMENTS):
        return "kernels are not compiled yet"
    compiled = len(ARGUMENTS) - len(lacking)
    return f"{compiled} of {len(ARGUMENTS)} kernels are compiled, others when first needed"


def _concerns_us(variable: str) -> bool:
    return variable.startswith(("BITSKIP_", "NUMBA_", "OMP_"))


def _check(name: str) -> dict[str, Any]:
    """A shipped model, read with every check."""
    path, problem = models.path(name), None
    try:
        folder = read_folder(path)
        if folder.tokenizer is None:
            problem = "lacks tokenizer.json"
        else:
            read_tokenizer(folder.tokenizer, folder.config.vocab_size)
    except (FormatError, OSError) as error:
        problem = f"{error}; install the package again"
    return {"name": name, "path": str(path), "problem": problem}


def describe(facts: dict[str, Any]) -> str:
    """The facts of `doctor` as text."""
    machine, isa_facts, cache = facts["machine"], facts["isa"], facts["cache"]
    packages = ", ".join(f"{k} {v or '(source tree)'}" for k, v in machine["packages"].items())
    lines = [
        ("cpu", f"{machine['cpu']} ({isa_facts['cpu']})"),
        ("cores", f"{machine['physical_cores']} physical, {machine['usable_cores']} usable"),
        ("threads", facts["threads"]),
        (
            "memory",
            f"{size(machine['memory_bytes'])}, {size(facts['memory_available_bytes'])} free",
        ),
        ("path", f"{isa_facts['path']} (possible: {', '.join(isa_facts['available'])})"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("packages", packages),
        (
            "cache",
            f"{cache['folder'] or 'none'} ({_readiness(cache['lacking'])})",
        ),
        *(("variable", f"{k}={v}") for k, v in facts["environment"].items()),
        *(("model", f"{m['name']}: {m['problem'] or 'intact'}") for m in facts["models"]),
    ]
    lines += [("problem", p) for p in facts["problems"]] or [("problems", "none")]
    return "\n".join(f"{name:<9} {value}" for name, value in lines)
