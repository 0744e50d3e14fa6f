"""Writes docs/SETTINGS.md from the settings' own words: python docs/make_settings.py"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bitskip_ref import config as model_config  # noqa: E402
from bitskip_ref.config import PRESETS, ModelConfig  # noqa: E402
from bitskip_train import settings as train_config  # noqa: E402
from bitskip_train.described import settings, toml_value  # noqa: E402
from bitskip_train.recipes import RECIPES  # noqa: E402
from bitskip_train.settings import TrainConfig, allowed  # noqa: E402

HEAD = """# Settings

Made from the source by `python docs/make_settings.py`; a test holds that it is up to date.

A run's settings are two tables, `[model]` and `[train]`. Each has one value for each name below.
They come, the later ones winning, from

1. `--preset NAME` (the last tables below), or a whole file: `--config FILE`;
2. the tables of `--config FILE`, if there is a preset, too;
3. `--data`, `--valid` and `--set NAME=VALUE`, which may be repeated.

`bitskip train ... --print-config` prints the outcome as such a file and does not train. A run
writes it to `config.toml` in its folder. No name is in both tables: `--set lr=3e-4` is enough.
A checkpoint holds its settings: `--resume` takes them from there.

"Source" names a rule of [SPEC](SPEC.md) or an equation of the papers: v1 is the first,
arXiv:2510.23766, v2 the second.
"""


def document() -> str:
    """The text of docs/SETTINGS.md."""
    lines = [HEAD]
    for kind, title in ((ModelConfig, "[model]"), (TrainConfig, "[train]")):
        lines.append(f"## {title}")
        lines.append(
            "Shape and arithmetic of the model; the exported folder's `config.json` has the same "
            "names.\n"
            if kind is ModelConfig
            else "How it is trained. A step takes `batch * accumulation` windows of `context` "
            "tokens; exit n means n executed blocks.\n"
        )
        lines += tables(kind)
    lines += ["## Presets", "What differs from the defaults above.", ""]
    lines += ["| preset | `[model]` | `[train]` |", "|---|---|---|"]
    for name, (model, train) in RECIPES.items():
        lines.append(f"| `{name}` | {differing(model)} | {differing(train)} |")
    others = ", ".join(f"`{name}`" for name in PRESETS if name not in RECIPES)
    lines += ["", f"For `bench --preset` alone (a shape without a training recipe): {others}.", ""]
    return "\n".join(lines)


def tables(kind: Any) -> Iterator[str]:
    """A table for each group of a class's fields."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    group = ""
    for setting in settings(kind):
        if setting.group != group:
            if group:
                yield ""
            group = setting.group
            yield f"### {group}\n"
            yield "| setting | type | default | allowed | meaning and source |"
            yield "|---|---|---|---|---|"
        default = fields[setting.name].default
        shown = "required" if default is dataclasses.MISSING else f"`{toml_value(default)}`"
        yield (
            f"| `{setting.name}` | {type_name(hints[setting.name])} | {shown} | "
            f"{range_of(kind, setting.name, hints[setting.name])} | "
            f"{setting.meaning.replace('|', chr(92) + '|')} |"
        )
    yield ""


def type_name(hint: Any) -> str:
    """A field's type in words."""
    words = {int: "whole number", float: "number", str: "text", bool: "yes or no"}
    lists = {tuple[int, ...]: "whole numbers", tuple[str, ...]: "texts"}
    return words.get(hint) or f"list of {lists[hint]}"


def range_of(kind: Any, name: str, hint: Any) -> str:
    """What a field may be; where that is a rule of several fields, its meaning says so."""
    module = model_config if kind is ModelConfig else train_config
    if name in module.CHOICES:
        return ", ".join(f"`{word}`" for word in module.CHOICES[name])
    if hint is bool:
        return "`true`, `false`"
    if kind is TrainConfig and hint in (int, float):
        low, high = allowed(name, hint)
        if high in (1 << 40, 1e9):  # which are there to stop slips of the hand
            return f"{low:g} or more"
        return f"{low:,} to {high:,}" if hint is int else f"{low:g} to {high:g}"
    if kind is ModelConfig and hint is int and name != "activation_bits":
        most = model_config.MOST_LAYERS if name == "num_hidden_layers" else 1 << 24
        return f"1 to {most:,}"
    return ""


def differing(values: Any) -> str:
    """The fields that are not at their defaults."""
    return ", ".join(
        f"`{field.name} = {toml_value(getattr(values, field.name))}`"
        for field in dataclasses.fields(values)
        if getattr(values, field.name) != field.default
    )


if __name__ == "__main__":
    (ROOT / "docs/SETTINGS.md").write_text(document(), encoding="utf-8")
