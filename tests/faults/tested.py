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
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in records():
        of.setdefault((run["what"], run["command"]), []).append(run)
    rows = [
        (what, f"`python -m {command}`", _ranges([r["seed"] for r in runs]),
         f"{sum(r['cases'] for r in runs):,}",
         f"{sum(r['seconds'] for r in runs):,}" if all("seconds" in r for r in runs) else "",
         max((r["memory"] for r in runs if "memory" in r), default=""),
         sum(r["faults"] for r in runs))
        for (what, command), runs in sorted(of.items())
    ]  # fmt: skip
    header = ("what", "command", "seeds", "cases", "seconds", "most memory (MiB)", "faults")
    return f"{before}{BEGIN}{table(header, rows)}\n{END}{rest.partition(END)[2]}"


def _ranges(seeds: list[int]) -> str:
    """As in 7, 11 to 14."""
    parts = list[list[int]]()
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(), "utf-8")
