"""A benchmark's output: Markdown, JSON, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bitskip.tables import size, table


def _number(form: str, scale: float = 1) -> Callable[[float], str]:
    return lambda value: format(scale * value, form)


# Header, key of a row (a dot leads into a value's own keys), how the value is written.
COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("test", "test", str),
    ("depth", "depth", lambda depth: str(depth or "")),
    ("exit", "exit_layer", str),
    ("threads", "threads", str),
    ("KV cache", "kv_cache", lambda kind: "" if kind == "float32" else kind),
    ("tokens/s", "tokens_per_s.median", _number(".1f")),
    ("mean ± sd", "tokens_per_s", lambda speed: "{mean:.1f} ± {sd:.1f}".format(**speed)),
    ("gain %", "gain_percent", _number(".1f")),
    ("first ms", "first_token_ms", _number(".1f")),
    ("p50 ms", "step_ms.p50", _number(".2f")),
    ("p95 ms", "step_ms.p95", _number(".2f")),
    ("tokens/J", "tokens_per_joule", _number(".2f")),
    ("roofline", "roofline", _number(".2f")),
    ("read GB/s", "read_bytes_per_s", _number(".1f", 1e-9)),
    ("of limit %", "read_share", _number(".0f", 100)),
    ("int8 peak %", "int8_share", _number(".0f", 100)),
    ("peak memory", "peak_rss_bytes", size),
]


@dataclass
class Report:
    """What was measured, as `-o json` prints it (docs/CLI.md, `bench`)."""

    machine: dict[str, Any]
    model: dict[str, Any]
    start: dict[str, Any]
    limits: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def format(self, kind: str) -> str:
        """The text as md, json, jsonl or csv, without a last newline."""
        if kind == "json":
            return json.dumps(vars(self))
        if kind == "jsonl":
            return "\n".join(json.dumps(values) for values in self.flat_rows())
        return self._csv() if kind == "csv" else self._markdown()

    def flat_rows(self) -> list[dict[str, Any]]:
        """Rows without nesting, each with machine, model and the limits it is measured by."""
        about = {
            "model": self.model["name"],
            "parameters": self.model["parameters"],
            "cpu": self.machine["cpu"],
            "isa": self.machine["isa"],
            "version": self.machine["packages"]["bitskip"],
        }
        limits = {found["threads"]: found for found in self.limits}
        result = []
        for values in self.rows:
            found = limits.get(values["threads"], {})
            medians = {
                f"limit_{name}": (found.get(name) or {}).get("median")
                for name in ("read_bytes_per_s", "multiply_adds_per_s")
            }
            result.append({**about, **_flat(values), **medians})
        return result

    def _csv(self) -> str:
        """A header, and a line per row; samples are separated by blanks."""
        rows = self.flat_rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for values in rows:
            samples = " ".join(map(str, values["tokens_per_s_samples"]))
            writer.writerow({**values, "tokens_per_s_samples": samples})
        return text.getvalue().removesuffix("\n")

    def _markdown(self) -> str:
        """Lines about model, machine and limits; a table of the columns that say something."""
        machine = self.machine
        lines = [
            self.model["name"],
            f"{machine['cpu']}, {machine['usable_cores']} cores, path {machine['isa']}, "
            f"load {machine['load_average'][0]:.1f} at the start",
            *map(_limit_line, self.limits),
        ]
        columns = []
        for header, key, write in COLUMNS:
            values = [_value(row, key) for row in self.rows]
            cells = ["" if value is None else write(value) for value in values]
            if any(cells):
                columns.append((header, cells))
        cells_by_row = list(zip(*(cells for _, cells in columns), strict=True))
        return "\n".join([*lines, "", table([header for header, _ in columns], cells_by_row)])


def _value(values: Mapping[str, Any], key: str) -> Any:
    first, _, rest = key.partition(".")
    return _value(values[first], rest) if rest else values[first]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a_b": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= {f"{key}_{inner}": v for inner, v in _flat(value).items()}
        else:
            result[key] = value
    return result


def _limit_line(found: Mapping[str, Any]) -> str:
    read, peak = found["read_bytes_per_s"], found["multiply_adds_per_s"]
    low, high = min(read["samples"]) / 1e9, max(read["samples"]) / 1e9
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    line = (
        f"limits of {threads}: {read['median'] / 1e9:.1f} GB/s ({low:.1f} to {high:.1f}) "
        f"reading {size(found['buffer_bytes'])}"
    )
    return f"{line}, {peak['median'] / 1e9:.0f} G int8 multiply-adds/s" if peak else line
