"""Loss of a text at exits: all fixed ones from one pass, the others one by one, as generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bitskip_cpu.heldout.beside import one_by_one, side_by_side
from bitskip_cpu.heldout.text import Text
from bitskip_ref.checks import check_exit_layers
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine
from bitskip_ref.exits.named import describe_rule
from bitskip_ref.heldout import HeldOutLoss, check_windows, token_losses, windows
from bitskip_ref.rows import Row
from bitskip_ref.rule import ExitRule

Advance = Callable[[int], None]
"""Called with the number of tokens whose loss has become known."""

AT_ONCE = 128  # tokens of a call, where nobody asks for the time of one


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

    def run(engine: Engine, cache: Any, window: tuple[int, int, int]) -> dict[int, np.ndarray]:
        begin, scored, end = window
        inputs, targets = text.tokens[begin:end], text.tokens[begin + 1 : end + 1]
        found = {n: np.empty(len(inputs)) for n in exits}

        def visit(n: int, first: int, z: np.ndarray) -> None:
            part = slice(first, first + len(z))
            found[n][part] = token_losses(z, targets[part])

        engine.extend_exits(inputs.tolist(), cache, exits, visit)
        # What lies before was context, scored by an earlier window.
        return {n: values[scored - begin :] for n, values in found.items()}

    yield from side_by_side(engine, run, windows(len(text.tokens), context, stride))


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
    at_once: int = 1,
    advance: Advance = lambda _: None,
) -> list[Stepped]:
    """Each rule's loss over all tokens but the first, as if they were generated, and the time.

    Windows are as in `exit_losses`. What a window shares with the one before it, or its first
    token, is the prompt (SPEC 8.2, 8.3); the text's own tokens follow, whatever is predicted. All
    rules take their turn at each window, so that a change in the machine's speed meets all alike.
    at_once: tokens that one call runs (SPEC 12.2), windows side by side (`Engine.beside`); 1
    measures the time of generating.
    """
    context, stride = check_windows(context, stride, engine.config.max_position_embeddings)
    for rule in rules:
        rule.check(engine.config)
    spans = list(windows(len(text.tokens), context, stride))
    jobs = [
        (span, (k + turn) % len(rules))
        for turn, span in enumerate(spans)
        for k in range(len(rules))
    ]

    def run(engine: Engine, cache: Any, job: tuple[tuple[int, int, int], int]) -> _Window:
        (begin, scored, end), k = job
        ids, prompt = text.tokens[begin : end + 1], scored - begin + 1
        return _run(engine, cache, ids, prompt, rules[k], at_once)

    timed = at_once == 1  # then not beside others, where a step takes longer
    found = (one_by_one if timed else side_by_side)(engine, run, jobs)
    ran: list[list[_Window]] = [[] for _ in rules]
    for ((_, scored, end), k), window in zip(jobs, found, strict=True):
        ran[k].append(window)
        advance(end - scored)
    sizes = np.array([end - scored for _, scored, end in spans])
    return [
        Stepped(
            rule, HeldOutLoss(np.array([w.loss for w in found]), sizes, text.bytes),
            np.concatenate([w.depths for w in found]), sizes - 1,
            np.array([w.seconds for w in found]),
        )
        for rule, found in zip(rules, ran, strict=True)
    ]  # fmt: skip


class _Window(NamedTuple):
    """A window that was run under a rule."""

    loss: float  # nats, of all tokens that it predicts
    depths: np.ndarray  # int64, of the passes that predict them
    seconds: float  # of all but the prompt


def _run(
    engine: Engine, cache: Any, ids: np.ndarray, prompt: int, rule: ExitRule, at_once: int
) -> _Window:
    """Predict ids[prompt:], each from all before it; the cache is empty."""
    depth, seconds = rule.deepest(engine.config), 0.0
    z = engine.extend(ids[:prompt].tolist(), cache, exit_layer=depth, last_only=True)
    losses, depths = [token_losses(z, ids[prompt : prompt + 1])], [depth]
    for at in range(prompt, len(ids) - 1, at_once):
        part = ids[at : min(at + at_once, len(ids) - 1)].tolist()
        start = time.perf_counter()
        if at_once == 1:
            found: Any = [engine.step(part[0], cache, rule)]
        else:
            found = engine.step_many([Row(token, cache, rule) for token in part])
        seconds += time.perf_counter() - start
        logits, ran = zip(*found, strict=True)
        losses.append(token_losses(logits, ids[at + 1 : at + 1 + len(part)]))
        depths += ran
    return _Window(float(np.concatenate(losses).sum()), np.array(depths), seconds)


def facts(
    rule: ExitRule, config: ModelConfig, losses: HeldOutLoss, mean_depth: float
) -> dict[str, Any]:
    """JSON values: how the rule is asked for, its mean depth, and its loss."""
    return {**describe_rule(rule, config), "mean_exit_layer": mean_depth, **losses.facts()}
