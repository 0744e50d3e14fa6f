"""What smaller caches cost in loss: held-out text at exits under each kind of cache, in pairs.

    python -m benchmarks.kv_cache [MODEL] --text held_out.txt [--exits 6,12,18,24] [--tokens N]
        [-o results/kv-cache/stories-24.json]

Prints a table (Markdown). Differences are taken window by window, so that their error is far below
that of a loss.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import bitskip_cpu
from bitskip.tables import table
from bitskip_cpu.heldout.scoring import exit_losses
from bitskip_cpu.heldout.text import read_text
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.files import replace_file


def measure(model: str | None, text: Path, exits: list[int], tokens: int | None) -> dict[str, Any]:
    """Perplexity of each kind of cache at each exit; what it costs, in nats with an error."""
    losses = {}
    for kind in KV_CACHES:
        loaded = bitskip_cpu.load(model, 1, kv_cache=kind)
        read = read_text(text, loaded, tokens)
        losses[kind] = exit_losses(loaded.engine, read, exits)
    usual, rows = losses[KV_CACHES[0]], []
    for kind, found in losses.items():
        for n, loss in found.items():
            more, error = loss.above(usual[n])
            rows.append({"kv_cache": kind, "exit": n, "ppl": loss.ppl, "nats": more, "se": error})
    about = {"model": loaded.folder.path.name, "tokens": usual[exits[0]].tokens}
    return about | {"context": loaded.config.max_position_embeddings, "rows": rows}


def render(facts: dict[str, Any]) -> str:
    """The table of `measure`'s facts: perplexities, and what a cache adds in % with 1.96 errors."""
    exits = sorted({row["exit"] for row in facts["rows"]})
    lines = []
    for kind in dict.fromkeys(row["kv_cache"] for row in facts["rows"]):
        cells = [kind]
        for row in sorted(
            (row for row in facts["rows"] if row["kv_cache"] == kind), key=lambda row: row["exit"]
        ):
            shown = f"{row['ppl']:.3f}"
            if kind != KV_CACHES[0]:
                shown += f" ({100 * math.expm1(row['nats']):+.3f} ± {196 * (row['se'] or 0):.3f} %)"
            cells.append(shown)
        lines.append(tuple(cells))
    return table(("KV cache", *(f"exit {n}" for n in exits)), lines)


def main() -> None:
    """The script."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", nargs="?")
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--exits", default="6,12,18,24")
    options.add_argument("--tokens", type=int)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    exits = [int(n) for n in given.exits.split(",")]
    facts = measure(given.model, given.text, exits, given.tokens)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(given.out) as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
    print(render(facts))


if __name__ == "__main__":
    main()
