"""What every token of a text would lose by stopping early, and what a rule would see of it.

From passes at full depth, so that any number of settings can be judged without running them. A
setting that is run differs a little: tokens that stop early leave other keys and values to later
ones (SPEC 8.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitskip_cpu.heldout.scoring import AT_ONCE, Advance, exit_token_losses, step_through
from bitskip_cpu.heldout.text import Text
from bitskip_cpu.heldout.watch import Watch
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.heldout import check_windows, windows
from bitskip_ref.rows import Row
from bitskip_ref.rule import ExitRule


def rule_of(
    measure: str, threshold: float, layers: Sequence[int] | None = None, last: int | None = None
) -> GateExit | ConfidenceExit:
    """The rule that decides by a measure."""
    looks = None if layers is None else tuple(layers)
    if measure == "gate":
        return GateExit(threshold, layers=looks, last=last)
    return ConfidenceExit(threshold, measure, layers=looks, last=last)


def look_layers(measure: str, config: ModelConfig) -> tuple[int, ...]:
    """Where settings are tried: a gate at every block, a head at each twelfth of the depth."""
    blocks = config.num_hidden_layers
    if measure == "gate":
        return tuple(range(1, blocks))
    return tuple(sorted({max(1, blocks * k // 12) for k in range(2, 12)} - {blocks}))


@dataclass(frozen=True)
class Costs:
    """Seconds of a step's parts: time = base + block * depth + look * looks."""

    base: float
    block: float
    looks: dict[str, float]  # measure -> seconds of a look

    @classmethod
    def measure(cls, engine: Engine, text: Text, measures: Sequence[str]) -> Costs:
        """Medians over short windows of the text's start, all parts in turn."""
        blocks = engine.config.num_hidden_layers
        half = max(1, blocks // 2)
        looking = {m: rule_of(m, 1.0) for m in measures}
        rules: list[ExitRule] = [FixedExit(half), FixedExit(blocks), *looking.values()]
        start = Text(text.tokens[:640], text.bytes, text.documents)
        context = min(32, engine.config.max_position_embeddings)
        found = step_through(engine, start, rules, context=context)
        at_half, full, *others = (1 / s.tokens_per_s if s.tokens_per_s else 0.0 for s in found)
        block = max(0.0, full - at_half) / max(1, blocks - half)
        looks = {
            m: max(0.0, seconds - full) / max(1, len(rule.looks(engine.config)))
            for (m, rule), seconds in zip(looking.items(), others, strict=True)
        }
        return cls(max(0.0, full - blocks * block), block, looks)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A setting, what it would lose and take."""

    rule: GateExit | ConfidenceExit
    loss: float  # nats a token
    depth: float  # mean
    seconds: float  # a token


class Survey:
    """Losses and measures of each predicted token, T in all."""

    losses: dict[int, np.ndarray]  # after each of 1..L blocks: f64 [T]
    measures: dict[str, np.ndarray]  # at each of `look_layers`: f64 [looks, T]

    def __init__(
        self,
        engine: Engine,
        text: Text,
        measures: Sequence[str],
        *,
        context: int | None = None,
        advance: Advance = lambda _: None,
    ) -> None:
        """`advance` hears of the text once, and once more for each of measures."""
        self.config = engine.config
        blocks = self.config.num_hidden_layers
        parts: dict[int, list[np.ndarray]] = {n: [] for n in range(1, blocks + 1)}
        done = 0
        for found in exit_token_losses(engine, text, [*parts], context=context):
            for n, values in found.items():
                parts[n].append(values)
            done += len(found[blocks])
            advance(len(found[blocks]))
        self.losses = {n: np.concatenate(values) for n, values in parts.items()}
        self.measures = {}
        for name in measures:
            self.measures[name] = np.full((len(look_layers(name, self.config)), done), -1.0)
            self._see(engine, text, name, context, advance)

    def _see(
        self, engine: Engine, text: Text, name: str, context: int | None, advance: Advance
    ) -> None:
        """Fill in a measure; a window's first prediction is its prompt's: nothing is below -1."""
        layers = look_layers(name, self.config)
        context, stride = check_windows(context, None, self.config.max_position_embeddings)
        cache = engine.new_cache()
        for begin, _, end in windows(len(text.tokens), context, stride):
            cache.length = 0
            watches = [Watch(self.config, layers, [name]) for _ in range(begin + 1, end)]
            rules: list[ExitRule] = [FixedExit(), *watches]
            rows = [
                Row(token, cache, rule, wanted=False)
                for token, rule in zip(text.tokens[begin:end].tolist(), rules, strict=True)
            ]
            for at in range(0, len(rows), AT_ONCE):
                engine.step_many(rows[at : at + AT_ONCE])
            if watches:
                seen = np.transpose([watch.seen[name] for watch in watches])
                self.measures[name][:, begin + 1 : end] = seen
            advance(end - begin)

    def judge(
        self, measure: str, threshold: float, layers: Sequence[int], last: int, costs: Costs
    ) -> Estimate:
        """What a setting whose layers are among `look_layers`, below `last`, would do."""
        places = look_layers(measure, self.config)
        exceeds = self.measures[measure][[places.index(n) for n in layers]] > threshold
        losses, tokens = self.losses[last].copy(), exceeds.shape[1]
        depths, looks = np.full(tokens, last), np.full(tokens, len(layers))
        for k in range(len(layers) - 1, -1, -1):
            stop = exceeds[k]
            losses[stop] = self.losses[layers[k]][stop]
            depths[stop], looks[stop] = layers[k], k + 1
        depth = float(depths.mean())
        seconds = costs.base + costs.block * depth + costs.looks[measure] * float(looks.mean())
        rule = rule_of(measure, threshold, layers, last)
        return Estimate(rule, float(losses.mean()), depth, seconds)

    def thresholds(self, measure: str, layers: Sequence[int], count: int = 20) -> list[float]:
        """Thresholds at which ever fewer looks would stop a token, rising."""
        places = look_layers(measure, self.config)
        seen = self.measures[measure][[places.index(n) for n in layers]]
        seen = seen[seen >= 0]
        values = np.quantile(seen, np.linspace(0.02, 1, count)) if seen.size else np.zeros(0)
        return sorted({round(float(v), 4) for v in values.clip(0, 1)})
