"""What an export has made, in a few lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def summary(path: Path) -> str:
    """Sizes, bits per weight and ternary statistics of a model folder."""
    from bitskip.tables import size, table
    from bitskip_cpu.inspect import bits, inspect

    facts = inspect(path)
    total = facts["bytes"]["total"]
    rows = [(kind, size(n), f"{n / total:.1%}") for kind, n in facts["bytes"].items()]
    lines = [
        table(("kind", "size", "share"), rows),
        f"{facts['parameters']:,} parameters; linear layers at {bits(facts)} per weight",
    ]
    if blocks := facts["layers"]:
        mean = {k: np.mean([b[k] for b in blocks]) for k in ("minus", "zero", "plus")}
        alphas = [a for b in blocks for a in b["alpha"].values()]
        sparsest = max(blocks, key=lambda b: b["zero"])
        lines += [
            f"weights -1: {mean['minus']:.1%}, 0: {mean['zero']:.1%}, +1: {mean['plus']:.1%}; "
            f"scales {min(alphas):.4g} to {max(alphas):.4g}",
            f"sparsest: block {sparsest['layer']}, {sparsest['zero']:.1%} zeros",
        ]
    return "\n".join(lines)
