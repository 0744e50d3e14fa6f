"""Where a figure was made: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "torch", "tokenizers", "optuna", "onnxruntime", "transformers")


def commit() -> str | None:
    """The commit of this checkout, with `+` if files were changed; None outside of one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """Machine and versions."""
    from bitskip_cpu.machine import fingerprint

    found = fingerprint()
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    return found
