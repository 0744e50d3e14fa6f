"""The verb `exits`: loss and speed against exit layer, and against threshold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitskip.tables import table
from bitskip.terminal import progress_bar
from bitskip_cpu.heldout.points import Against, Point, points
from bitskip_cpu.heldout.scoring import step_through
from bitskip_cpu.heldout.text import read_text
from bitskip_cpu.model import Model
from bitskip_ref.config import ModelConfig
from bitskip_ref.heldout import check_windows
from bitskip_ref.rule import ExitRule


def curve(
    model: Model,
    path: Path,
    rules: Sequence[ExitRule],
    context: int | None,
    limit: int,
    as_json: bool,
    plot: Path | None,
) -> str:
    """What `bitskip-cpu exits` prints; the picture, if one is asked for, goes to `plot`."""
    config = model.config
    context, _ = check_windows(context, None, config.max_position_embeddings)
    text = read_text(path, model, limit)
    with progress_bar("measuring", len(rules) * (len(text.tokens) - 1)) as advance:
        found = step_through(model.engine, text, rules, context=context, advance=advance)
    made = points(found, config)
    counted = (
        f"{found[0].losses.tokens} tokens of {path.name}, context and stride {context}, "
        f"{model.threads} thread{'s' * (model.threads > 1)}"
    )
    if plot is not None:
        from bitskip_cpu.heldout import plotting

        plotting.draw(made, plot, f"{model.folder.path.name}: {counted}")
    if as_json:
        about = {"model": str(model.folder.path), "text": str(path), "context": context}
        about |= {"threads": model.threads, "bytes": text.bytes, "documents": text.documents}
        return json.dumps({**about, "exits": [_facts(p, config) for p in made]})
    drawn = "" if plot is None else f"\npicture: {plot}"
    return f"{_table(made)}\n{counted}; * nothing is both faster and better{drawn}"


def _facts(p: Point, config: ModelConfig) -> dict[str, Any]:
    speed = {"tokens_per_s": p.found.tokens_per_s, "pareto": p.pareto}
    against: dict[str, float | None] = {}
    for name, found in (
        ("against_fixed", p.against_fixed),
        ("at_equal_multiply_adds", p.at_equal_multiply_adds),
        ("at_equal_time", p.at_equal_time),
    ):
        against[f"loss_{name}"], against[f"loss_{name}_se"] = found or (None, None)
    return {**p.found.facts(config), **speed, **against}


def _difference(found: Against) -> str:
    if found is None:
        return ""
    more, error = found
    return f"{more:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _table(made: Sequence[Point]) -> str:
    rows = []
    fastest = max(made, key=lambda p: p.found.mean_depth).found.tokens_per_s
    for p in made:
        loss, speed = p.found.losses, p.found.tokens_per_s
        error = "" if loss.loss_se is None else f" ± {loss.loss_se:.4f}"
        rows.append(
            (
                p.label,
                f"{p.found.mean_depth:.2f}".removesuffix(".00"),
                f"{loss.loss:.4f}{error}",
                f"{loss.ppl:.3f}",
                f"{loss.bits_per_byte:.4f}",
                _difference(p.against_fixed),
                _difference(p.at_equal_multiply_adds),
                _difference(p.at_equal_time),
                "" if speed is None else f"{speed:.0f}",
                "" if speed is None or not fastest else f"{speed / fastest:.2f}",
                "*" if p.pareto else "",
            )
        )
    header = (
        "exit", "mean depth", "loss", "perplexity", "bits/byte", "loss - fixed of that depth",
        "at equal multiply-adds", "at equal time", "tokens/s", "of deepest", "",
    )  # fmt: skip
    return table(header, rows)
