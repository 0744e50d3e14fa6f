"""Loss of a text at exits: all fixed ones from one pass, the others token by token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitskip_cpu.heldout.text import Text
from bitskip_ref.checks import check_exit_layers
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.lookup import SMALL
from bitskip_ref.engine import Engine, Row
from bitskip_ref.exits.named import describe_rule
from bitskip_ref.heldout import HeldOutLoss, check_windows, token_losses, windows
from bitskip_ref.rule import ExitRule

Advance = Callable[[int], None]
"""Called with the number of tokens whose loss has become known."""

TOGETHER = 16  # windows side by side, where nobody asks for the speed of one


def side_by_side(config: ModelConfig) -> int:
    """How many windows to run side by side: one where a model lies in the processor's caches.

    There the keys and values of 16 windows would push it, and each other, out.
    """
    return 1 if config.quantizable_parameters() < SMALL else TOGETHER


def exit_token_losses(
    engine: Engine,
    text: Text,
    exit_layers: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
) -> Iterator[dict[int, np.ndarray]]:
    """Window by window: exit -> losses of the tokens that are new in it, in order of depth.

    Each block runs once. context: inputs of a window (None: the model's context); stride: from
    window to window, at most the context (None: the context, no overlap). Raises ValueError for
    numbers out of range.
    """
    context, stride = check_windows(context, stride, engine.config.max_position_embeddings)
    exits = check_exit_layers(exit_layers, engine.config)
    for begin, scored, end in windows(len(text.tokens), context, stride):
        inputs, targets = text.tokens[begin:end], text.tokens[begin + 1 : end + 1]
        found = {n: np.empty(len(inputs)) for n in exits}

        def visit(
            n: int, first: int, z: np.ndarray,
            found: dict[int, np.ndarray] = found, targets: np.ndarray = targets,
        ) -> None:  # fmt: skip
            part = slice(first, first + len(z))
            found[n][part] = token_losses(z, targets[part])

        engine.extend_exits(inputs.tolist(), engine.new_cache(), exits, visit)
        # What lies before was context, scored by an earlier window.
        yield {n: values[scored - begin :] for n, values in found.items()}


def exit_losses(
    engine: Engine,
    text: Text,
    exit_layers: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    advance: Advance = lambda _: None,
) -> dict[int, HeldOutLoss]:
    """Exit -> loss over all tokens but the first, in order of depth; arguments as above."""
    sums: dict[int, list[float]] = {}
    sizes = []
    for found in exit_token_losses(engine, text, exit_layers, context=context, stride=stride):
        for n, values in found.items():
            sums.setdefault(n, []).append(float(values.sum()))
        sizes.append(len(values))
        advance(len(values))
    return {n: HeldOutLoss(np.array(s), np.array(sizes), text.bytes) for n, s in sums.items()}


@dataclass(frozen=True, eq=False)
class Stepped:
    """A text that was predicted under a rule as if it were being generated."""

    rule: ExitRule
    losses: HeldOutLoss
    depths: np.ndarray  # int [tokens predicted]: blocks of the pass that predicted each (SPEC 8.7)
    steps: np.ndarray  # int [W]: single steps of each window, all that is not its prompt
    seconds: np.ndarray  # [W]: what they took

    @property
    def mean_depth(self) -> float:
        """Blocks a predicted token."""
        return float(self.depths.mean())

    @property
    def tokens_per_s(self) -> float | None:
        """Steps a second, the median over windows; None without steps."""
        timed = self.steps > 0
        return float(np.median(self.steps[timed] / self.seconds[timed])) if timed.any() else None

    def facts(self, config: ModelConfig) -> dict[str, Any]:
        """What the verbs' JSON says of it, but for the speed."""
        return facts(self.rule, config, self.losses, self.mean_depth)


def step_through(
    engine: Engine,
    text: Text,
    rules: Sequence[ExitRule],
    *,
    context: int | None = None,
    stride: int | None = None,
    together: int = 1,
    advance: Advance = lambda _: None,
) -> list[Stepped]:
    """Each rule's loss over all tokens but the first, token by token, and the time.

    Windows are as in `exit_losses`. What a window shares with the one before it, or its first
    token, is the prompt (SPEC 8.2, 8.3); the text's own tokens follow, whatever is predicted. All
    rules take their turn at each window, so that a change in the machine's speed meets all alike.
    together: windows that run side by side (SPEC 12.2), in equal parts of the time they took.
    """
    context, stride = check_windows(context, stride, engine.config.max_position_embeddings)
    sizes, steps = [], []
    sums: list[list[float]] = [[] for _ in rules]
    depths: list[list[int]] = [[] for _ in rules]
    seconds: list[list[float]] = [[] for _ in rules]
    for rule in rules:
        rule.check(engine.config)
    places = list(windows(len(text.tokens), context, stride))
    for turn, at in enumerate(range(0, len(places), together)):
        part = places[at : at + together]
        sizes += [end - scored for _, scored, end in part]
        steps += [end - scored - 1 for _, scored, end in part]
        for k in range(len(rules)):
            k = (k + turn) % len(rules)
            group = [
                _Window(engine, text.tokens[begin : end + 1], scored - begin + 1, rules[k])
                for begin, scored, end in part
            ]
            taken = _run(engine, group, rules[k])
            for window in group:
                sums[k].append(float(np.sum(window.losses)))
                depths[k] += window.depths
                seconds[k].append(taken / len(group))
                advance(len(window.losses))
    return [
        Stepped(
            rule, HeldOutLoss(np.array(sums[k]), np.array(sizes), text.bytes),
            np.array(depths[k]), np.array(steps), np.array(seconds[k]),
        )
        for k, rule in enumerate(rules)
    ]  # fmt: skip


class _Window:
    """A window on its way, its prompt run."""

    def __init__(self, engine: Engine, ids: np.ndarray, prompt: int, rule: ExitRule) -> None:
        self.cache, depth = engine.new_cache(), rule.deepest(engine.config)
        z = engine.extend(ids[:prompt].tolist(), self.cache, exit_layer=depth, last_only=True)
        self.left = deque(ids[prompt:].tolist())
        self.losses, self.depths = list[float](), list[int]()
        _score([self], z, [depth])


def _score(group: Sequence[_Window], z: np.ndarray, depths: Iterable[int]) -> None:
    """Note the loss of each one's next token under logits f32 [windows, V]."""
    losses = token_losses(z, np.array([window.left[0] for window in group]))
    for window, loss, depth in zip(group, losses.tolist(), depths, strict=True):
        window.losses.append(loss)
        window.depths.append(depth)


def _run(engine: Engine, group: Sequence[_Window], rule: ExitRule) -> float:
    """Run windows to their ends, side by side; seconds of the steps."""
    seconds = 0.0
    while live := [window for window in group if len(window.left) > 1]:
        ids = [window.left.popleft() for window in live]
        start = time.perf_counter()
        if len(live) == 1:
            found: Any = [engine.step(ids[0], live[0].cache, rule)]
        else:
            found = engine.step_many(
                [Row(i, w.cache, rule) for i, w in zip(ids, live, strict=True)]
            )
        seconds += time.perf_counter() - start
        _score(live, np.stack([z for z, _ in found]), (n for _, n in found))
    return seconds


def facts(
    rule: ExitRule, config: ModelConfig, losses: HeldOutLoss, mean_depth: float
) -> dict[str, Any]:
    """JSON values: how the rule is asked for, its mean depth, and its loss."""
    return {**describe_rule(rule, config), "mean_exit_layer": mean_depth, **losses.facts()}
