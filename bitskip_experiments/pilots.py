"""The tables of docs/EXITS.md, from results/exits/{pilots,recipe,teacher}.json.

`python -m bitskip_experiments.pilots` writes results/exits/table.md.
Rows are settings, columns exits; means over seeds. What is changed in `three-detach` is a
difference at equal seeds with the standard error, at the last layer with the 95 % interval and
Holm's p. Then the run of recipe `stories-24` at the shipped width, step by step, and its end; and a
twin with a teacher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitskip_experiments.statistics import Mean, contrast, holm, mean
from bitskip_ref.files import replace_file

Losses = dict[str, dict[int, dict[str, float]]]
"""name -> seed -> exit -> loss in nats."""

EXITS = ("3", "6", "12", "18", "24")
BASE = "three-detach"
CHANGES = {
    "three-inverse": "weights 1 / n (early-heavy), `exit_weights=inverse`",
    "three-linear": "weights n + 1 (deep-heavy), `exit_weights=linear`",
    "three-ramp": "exit loss grows from 0 over the first half, `exit_ramp=120`",
    "three-norms": "a norm for each exit, `exit_norm=per_layer`",
    "three-shared": "norm and head learn from exits, too, `exit_detach=false`",
    "three-dropout": "layer dropout of the first paper, `dropout_max=0.5`",
    "three-dropout-ramp": "the same, growing over the first half, `dropout_ramp=120`",
    "three-detach-distill": "distilled from the first step on, `exit_distill=1.0`",
}
NAMES = ("none", "lin2-nodrop", "lin2", "lin2-nodrop-detach", "lin2-detach-distill", BASE)
PAIRS = (
    ("detached less shared head, two exits in rotation", "lin2-nodrop-detach", "lin2-nodrop"),
    ("three exits less two in rotation, detached", BASE, "lin2-nodrop-detach"),
    ("three exits, detached, less no exit loss", BASE, "none"),
    ("shared head, two exits in rotation, less no exit loss", "lin2-nodrop", "none"),
)


def read(path: Path) -> tuple[Losses, dict[str, list[str]]]:
    """Losses, and each name's settings."""
    losses: Losses = {}
    settings: dict[str, list[str]] = {}
    for run in json.loads(path.read_text("utf-8"))["runs"]:
        losses.setdefault(run["name"], {})[run["seed"]] = run["loss"]
        settings[run["name"]] = run["settings"]
    return losses, settings


def difference(losses: Losses, plus: str, minus: str, exit_layer: str) -> Mean:
    """One setting less another at an exit, paired by seed."""
    sides = ({s: x[exit_layer] for s, x in losses[name].items()} for name in (plus, minus))
    one, other = sides
    return contrast([one], [other])


def page(folder: Path) -> str:
    """results/exits/table.md."""
    losses, settings = read(folder / "pilots.json")
    lines = [
        "# What makes early exits good", "",
        "| name | settings | seeds | " + " | ".join(f"exit {n}" for n in EXITS) + " |",
        "|---|---|---:|" + "---:|" * len(EXITS),
    ]  # fmt: skip
    for name in NAMES:
        cells = [_level(mean([x[n] for x in losses[name].values()])) for n in EXITS]
        seeds = ", ".join(map(str, sorted(losses[name])))
        row = [name, ", ".join(settings[name]), seeds, *cells]
        lines.append("| " + " | ".join(row) + " |")
    compared = [(text, name, BASE) for name, text in CHANGES.items()]
    for title, pairs in (("difference", list(PAIRS)), (f"changed in `{BASE}`", compared)):
        heads = " | ".join(f"exit {n}" for n in EXITS)
        lines += ["", f"| {title} | {heads} | 24: 95 % interval | p (Holm) |"]
        lines += ["|---|" + "---:|" * (len(EXITS) + 2)]
        last = [difference(losses, plus, minus, "24") for _, plus, minus in pairs]
        p_values = [found.p_value(0.0) for found in last]
        adjusted = holm([1.0 if p is None else p for p in p_values])  # None: one seed
        for (text, plus, minus), found, p in zip(pairs, last, adjusted, strict=True):
            cells = [_change(difference(losses, plus, minus, n)) for n in EXITS]
            low, high = found.interval or (found.value, found.value)
            lines.append(f"| {text} | {' | '.join(cells)} | {low:+.3f} to {high:+.3f} | {p:.2g} |")
    lines += _recipe(json.loads((folder / "recipe.json").read_text("utf-8")))
    lines += _teacher(json.loads((folder / "teacher.json").read_text("utf-8")))
    for name in ("student", "again", "further"):
        lines += _recipe(json.loads((folder / f"{name}.json").read_text("utf-8")))
    lines += [
        "", "- Loss in nats a token, ± the standard error over seeds; differences at equal seed. "
        "p: two-sided t test of the difference at exit 24 against 0, Holm over the rows of its "
        "table.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _recipe(found: dict[str, Any]) -> list[str]:
    """Two tables: held-out loss as training went, and bits a byte of the exported model."""
    exits = EXITS[1:]
    heads = " | ".join(f"exit {n}" for n in exits)
    rule = "---:|" * len(exits)
    lines = ["", f"| step | {heads} | training loss |", f"|---:|{rule}---:|"]
    for at in found["evaluations"]:
        losses = " | ".join(f"{at['loss'][n]:.3f}" for n in exits)
        lines.append(f"| {at['step']:,} | {losses} | {at['training_loss']:.2f} |")
    lines += ["", f"| bits a byte | {heads} |", f"|---|{rule}"]
    for text in ("held out", "training text"):
        bits = " | ".join(f"{found[text][n]['bits_per_byte']:.4f}" for n in exits)
        lines.append(f"| {text} | {bits} |")
    return lines


def _teacher(found: dict[str, Any]) -> list[str]:
    """Held-out loss of a small twin, with a teacher and without: at full depth as training went,
    and at its end what exits add to it."""
    steps = [at["step"] for at in found["runs"][0]["evaluations"]]
    heads = [*(f"step {n:,}" for n in steps), *(f"exit {n}" for n in (18, 12, 6))]
    lines = ["", f"| twin | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for run in found["runs"]:
        ends = [at["loss"] for at in run["evaluations"]]
        cells = [f"{loss['24']:.3f}" for loss in ends]
        cells += [f"{ends[-1][n] - ends[-1]['24']:+.3f}" for n in ("18", "12", "6")]
        lines.append(f"| {run['name']} | {' | '.join(cells)} |")
    return lines


def _level(found: Mean) -> str:
    return f"{found.value:.3f}" + (f" ± {found.error:.3f}" if found.error else "")


def _change(found: Mean) -> str:
    return f"{found.value:+.3f}" + (f" ± {found.error:.3f}" if found.error else "")


if __name__ == "__main__":
    folder = Path(__file__).parent.parent / "results/exits"
    with replace_file(folder / "table.md") as file:
        file.write(page(folder).encode())
