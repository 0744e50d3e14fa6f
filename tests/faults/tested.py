"""`python -m tests.faults.tested`: the table of long runs in SECURITY.md, from their records."""

from __future__ import annotations

import json
from pathlib import Path

from bitskip.tables import table

ROOT = Path(__file__).parents[2]
RUNS, DOCUMENT = ROOT / "results/hardening/runs.json", ROOT / "SECURITY.md"
BEGIN, END = "<!-- runs -->\n", "<!-- end of runs -->"


def rendered() -> str:
    """The document with the table of all runs."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    rows = [
        (r["what"], f"`python -m {r['command']}`", r["seed"], f"{r['cases']:,}",
         f"{r['seconds']:,}" if "seconds" in r else "", r["faults"])
        for r in json.loads(RUNS.read_text("utf-8"))
    ]  # fmt: skip
    header = ("what", "command", "seed", "cases", "seconds", "faults")
    return f"{before}{BEGIN}{table(header, rows)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(), "utf-8")
