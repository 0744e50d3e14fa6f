"""`python -m tests.faults.tested`: the table of long runs in SECURITY.md, from their records."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from bitskip.tables import table

ROOT = Path(__file__).parents[2]
RUNS, DOCUMENT = ROOT / "results/hardening/runs.json", ROOT / "SECURITY.md"
BEGIN, END = "<!-- runs -->\n", "<!-- end of runs -->"
SAME = ("what", "command", "seed", "commit")  # pieces of one run
ADDED = ("cases", "seconds", "faults")


def commit() -> str:
    """The version that runs, as Git names it."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout[:-1]


def records(path: Path = RUNS) -> list[dict[str, Any]]:
    """All runs, as recorded."""
    stored: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return stored


def record(path: Path, piece: dict[str, Any]) -> None:
    """Add a piece of a run to the records: to that of the same run, if one is there.

    piece: what, command, seed, commit, cases, seconds, faults, and where it was measured memory,
    the most that a case took, in MiB.
    """
    runs = records(path)
    for run in runs:
        if all(run.get(name) == piece[name] for name in SAME):
            run |= {name: run[name] + piece[name] for name in ADDED}
            run |= {name: max(run[name], piece[name]) for name in ("memory",) if name in piece}
            break
    else:
        runs.append(piece)
    lines = ",\n".join("  " + json.dumps(run) for run in runs)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def rendered() -> str:
    """The document with the table of all runs."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    rows = [
        (r["what"], f"`python -m {r['command']}`", r["seed"], f"{r['cases']:,}",
         f"{r['seconds']:,}" if "seconds" in r else "", r.get("memory", ""), r["faults"])
        for r in records()
    ]  # fmt: skip
    header = ("what", "command", "seed", "cases", "seconds", "most memory (MiB)", "faults")
    return f"{before}{BEGIN}{table(header, rows)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(), "utf-8")
