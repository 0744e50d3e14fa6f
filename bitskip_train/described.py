"""Settings in words: what each means, from the strings below the fields; all of them as TOML.

A class of settings is a dataclass whose fields each have a string below them. Among them a comment
on a line of its own begins a group.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from typing import Any, NamedTuple

from bitskip_ref.config import ModelConfig
from bitskip_train.settings import TrainConfig

WIDTH = 98  # of a comment's text


class Setting(NamedTuple):
    """One field in words."""

    name: str
    group: str
    meaning: str  # one paragraph


def settings(kind: type) -> tuple[Setting, ...]:
    """The fields of a class of settings, in their order."""
    text = textwrap.dedent(inspect.getsource(kind))
    lines = text.splitlines()
    body = ast.parse(text).body[0]
    assert isinstance(body, ast.ClassDef)
    found, group, seen = [], "", body.body[0].end_lineno or 0
    for field, meaning in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        words = meaning.value if isinstance(meaning, ast.Expr) else None
        assert isinstance(words, ast.Constant), f"{kind.__name__}.{field.target.id}: no meaning"
        for line in lines[seen : field.lineno]:
            if comment := re.fullmatch(r"    # (.+)", line):
                group = comment[1]
        seen = meaning.end_lineno or 0
        found.append(Setting(field.target.id, group, " ".join(str(words.value).split())))
    return tuple(found)


def to_toml(model: ModelConfig, train: TrainConfig) -> str:
    """All settings as the text of a file for `train --config`, each with its meaning above it."""
    lines: list[str] = []
    tables: tuple[tuple[str, Any], ...] = (("model", model), ("train", train))
    for table, values in tables:
        lines += ["" if lines else "# bitskip train --config FILE", f"[{table}]"]
        group = ""
        for setting in settings(type(values)):
            if setting.group != group:
                group = setting.group
                lines += ["", f"# ---- {group} ----"]
            lines += textwrap.wrap(
                setting.meaning, WIDTH, initial_indent="# ", subsequent_indent="# "
            )
            lines.append(f"{setting.name} = {toml_value(getattr(values, setting.name))}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A bool, number, text, or list of them, as TOML spells it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, str):  # JSON spells all but this character as TOML does
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
