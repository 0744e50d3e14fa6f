"""Rows of many sequences as the scheduler gives them to an engine (SPEC 12)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from bitskip_ref.engine import Engine, Row

Found = tuple[np.ndarray | None, int]
"""(logits f32 [V], or None where they were not wanted, depth)."""


def run_rows(engine: Engine, rows: Sequence[Row]) -> list[Found]:
    """`Engine.step_many`; parts of prompts run as products of many tokens."""
    found: list[Found] = []
    single: list[Row] = []

    def flush() -> None:
        if single:
            found.extend(engine.step_many(single))
            single.clear()

    for _, group in groupby(rows, key=lambda row: (id(row.cache), row.rule)):
        run = list(group)
        cache, rule = run[0].cache, run[0].rule
        if len(run) == 1 or rule.looks(engine.config):
            single += run
            continue
        flush()
        depth = rule.deepest(engine.config)
        last_only = not any(row.wanted for row in run[:-1])
        ids = [row.token_id for row in run]
        z = engine.extend(ids, cache, exit_layer=depth, last_only=last_only)
        found += [(z[i] if run[i].wanted else None, depth) for i in range(-len(run), 0)]
    flush()
    return found
