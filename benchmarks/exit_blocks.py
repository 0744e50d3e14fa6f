"""Exits with and without blocks of their own (SPEC 8.8): loss, drafts that stand, work.

    python benchmarks/exit_blocks.py --text held_out.txt -o results/exit-blocks NAME=FOLDER ...

Measures each folder and keeps it in OUT/figures.json under its name, beside what is there; writes
OUT/table.md from that. Drafts: greedy, K = 4, continuing the first documents of the text, verified
at full depth. No speed is measured: work is counted in blocks, an exit block by its weights.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import bitskip_cpu
from benchmarks.speculate import prompts_of
from bitskip_cpu.bench.costs import linear_weights
from bitskip_cpu.cli.loading import prepare
from bitskip_cpu.heldout.scoring import exit_losses
from bitskip_cpu.heldout.text import read_text
from bitskip_cpu.model import Model
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.exits import FixedExit
from bitskip_ref.files import replace_file

DRAFTS = 4


def measured(
    model: Model, path: Path, exits: list[int], tokens: int, prompts: int, length: int
) -> dict[str, Any]:
    """Figures of one model, as JSON keeps them."""
    config, depth = model.config, model.config.num_hidden_layers
    text = read_text(path, model, tokens)
    context = model.folder.trained_context or config.max_position_embeddings
    losses = exit_losses(model.engine, text, [*exits, depth], context=context)
    found: dict[str, Any] = {
        "blocks": list(config.exit_blocks), "depth": depth, "tokens": losses[depth].tokens,
        "context": context, "full": losses[depth].loss, "exits": {},
    }  # fmt: skip
    starts = prompts_of(path, model, prompts, 24)
    for n in exits:
        drafted = accepted = 0
        for prompt in starts:
            how = Speculation(config, FixedExit(), n, DRAFTS)
            ends = model.folder.end_ids
            for _ in speculate(model.engine, prompt, how, Sampler(), length, ends):
                pass
            drafted, accepted = drafted + how.drafted, accepted + how.accepted
        found["exits"][str(n)] = {
            "loss": losses[n].loss, "drafted": drafted, "accepted": accepted,
            "work": linear_weights(config, n) * depth / linear_weights(config, depth),
        }  # fmt: skip
    return found


def page(figures: dict[str, Any]) -> str:
    """table.md of figures.json."""
    header = "| model | exit | work, in blocks | loss | above full depth | drafts accepted |"
    lines = ["# Exit blocks", "", header, "|---|---:|---:|---:|---:|---:|"]
    for name, found in figures.items():
        for n, at in found["exits"].items():
            own = ", with a block" if int(n) in found["blocks"] else ""
            share = at["accepted"] / at["drafted"]
            lines.append(
                f"| {name} | {n}{own} | {at['work']:.2f} | {at['loss']:.4f} | "
                f"{math.expm1(at['loss'] - found['full']):+.1%} | {share:.1%} |"
            )
        lines.append(f"| {name} | {found['depth']} | {found['depth']} | {found['full']:.4f} | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, keep, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--out", "-o", type=Path, required=True)
    parser.add_argument("--exits", default="6,12,18")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("-n", "--max-tokens", type=int, default=60)
    options = parser.parse_args()
    kept = options.out / "figures.json"
    figures = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    prepare()
    for pair in options.models:
        name, _, folder = pair.partition("=")
        exits = [int(n) for n in options.exits.split(",")]
        figures[name] = measured(
            bitskip_cpu.load(folder, 1), options.text, exits, options.tokens, options.prompts,
            options.max_tokens,
        )  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        with replace_file(kept) as file:
            file.write((json.dumps(figures, indent=1) + "\n").encode())
    with replace_file(options.out / "table.md") as file:
        file.write(page(figures).encode())
    print(page(figures))


if __name__ == "__main__":
    main()
