"""Rows (SPEC 12): what an engine is asked to run, and where it goes once all of it may.

`plan` and `plan_round` check what `Engine.step_many` and its kin are given. They are called in the
turn of the engine and its caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bitskip_ref.checks import check_exit_layer, check_looks, check_room, check_token, is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.contenders import Contenders, check_contenders
from bitskip_ref.decoding.draft import MOST, Draft, GreedyRound, check_draft
from bitskip_ref.rule import ExitRule, check_rule


class Row(NamedTuple):
    """One token of one sequence, to be run after what its cache holds (SPEC 12.1)."""

    token_id: int
    cache: Any  # from the engine's `new_cache`
    rule: ExitRule  # how many blocks it runs
    wanted: bool = True  # whether logits are asked for


class Run(NamedTuple):
    """Rows of one sequence that run together, checked: what primitives work on."""

    ids: np.ndarray | Sequence[int]  # int64 [T]
    cache: Any
    first: int  # position of the first row; the others follow
    contenders: Contenders | None = None  # which logits are asked for (SPEC 9.6); None: all


class Planned(NamedTuple):
    """A row of `step_many`, checked."""

    run: Run  # of one token
    rule: ExitRule
    looks: tuple[int, ...]
    deepest: int
    wanted: bool


class PlannedRound(NamedTuple):
    """A GreedyRound, checked."""

    run: Run  # of one token
    most: int  # drafts
    draft: Draft
    depth: int


def asks(rule: ExitRule, config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """The rule's looks and its last block. Raises ValueError for what is none, or is wrong."""
    check_rule(rule)
    deepest = check_exit_layer(rule.deepest(config), config)
    looks = rule.looks(config)
    return (check_looks(looks, deepest) if looks else ()), deepest


def plan(rows: Sequence[Row], config: ModelConfig) -> list[Planned]:
    """Where each row goes, if all of them may. Raises ValueError as `Engine.step`."""
    planned, ahead = [], dict[int, tuple[int, int]]()  # next position, whole blocks up to it
    rules = {id(row.rule): row.rule for row in rows}
    asked = {key: asks(rule, config) for key, rule in rules.items()}
    for token_id, cache, rule, wanted in rows:
        looks, deepest = asked[id(rule)]
        if id(cache) not in ahead:
            ahead[id(cache)] = cache.require(deepest), deepest
        position, depth = ahead[id(cache)]
        cache.serves(deepest, depth)
        ahead[id(cache)] = position + 1, deepest
        token = check_token(token_id, position, config, cache.room)
        run = Run((token,), cache, position)
        planned.append(Planned(run, rule, looks, deepest, bool(wanted)))
    return planned


def plan_round(
    asked: GreedyRound, config: ModelConfig, contenders: Contenders | None = None
) -> PlannedRound:
    """The round, if it may be run. Raises ValueError as `Engine.speculate`."""
    token_id, cache, count, draft, exit_layer = asked
    n = check_exit_layer(exit_layer, config)
    check_draft(draft, n, config)
    if not is_whole(count) or not 0 <= count <= MOST:
        raise ValueError(f"{count} drafts: a round takes 0..{MOST}")
    first = cache.require(n)
    token = check_token(token_id, first, config, cache.room)
    check_room(first, count + 1, cache.room)
    run = Run((token,), cache, first, check_contenders(contenders))
    return PlannedRound(run, int(count), draft, n)
