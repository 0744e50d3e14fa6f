"""Figures made of others: each has one formula, stated here and under the tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bitskip_experiments.errors import ExperimentError

Figures = dict[str, Any]


def look_up(figures: Figures, path: str) -> float | str:
    """The figure at a dotted path; `derived.NAME` is computed. Raises ExperimentError."""
    if path.startswith("derived."):
        name = path.removeprefix("derived.")
        if name not in DERIVED:
            raise ExperimentError(f"figure {path!r}: unknown; known: {', '.join(DERIVED)}")
        return DERIVED[name](figures)
    value: Any = figures
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ExperimentError(f"figure {path!r}: the result has no {key!r}; measure it again")
        value = value[key]
    if not isinstance(value, int | float | str):
        raise ExperimentError(f"figure {path!r}: is no number")
    return value


def _ppl(figures: Figures, exit_layer: int) -> float:
    return float(look_up(figures, f"exits.{exit_layer}.ppl"))


def ppl_increase(figures: Figures) -> float:
    """PPL at exit 18 over full depth's, less 1."""
    return _ppl(figures, 18) / _ppl(figures, 24) - 1


def _gain(figures: Figures, exit_layer: int) -> float:
    full = float(look_up(figures, "speed.24"))
    return float(look_up(figures, f"speed.{exit_layer}")) / full - 1


def speed_gain(figures: Figures) -> float:
    """Tokens a second at exit 18 over full depth's, less 1."""
    return _gain(figures, 18)


def quality_speed_ratio(figures: Figures) -> float:
    """Relative loss of quality for each relative gain of speed, at exit 18: less is better."""
    return ppl_increase(figures) / speed_gain(figures)


def optimal_exit(figures: Figures) -> float:
    """Of the exits 6, 12 and 18 the one with the least ratio of that kind."""
    full = _ppl(figures, 24)
    return min((6, 12, 18), key=lambda n: (_ppl(figures, n) / full - 1) / _gain(figures, n))


def viability(figures: Figures) -> str:
    """In a word: what exit 18 loses is below 5 %, below 10 %, below 20 %, or more."""
    lost = ppl_increase(figures)
    limits = ((0.05, "Excellent"), (0.1, "Good"), (0.2, "Fair"), (math.inf, "Poor"))
    return next(word for limit, word in limits if lost < limit)


def ternary_cost(figures: Figures) -> float:
    """Loss of the quantized model less that with weights and activations bypassed, in nats."""
    found = [look_up(figures, f"bypass.{name}.loss") for name in ("none", "activations")]
    return float(found[0]) - float(found[1])


def degradation(figures: Figures) -> float:
    """Perplexity of the quantized model over that in full precision, less 1."""
    return math.expm1(min(700.0, ternary_cost(figures)))


def ternary_bits(figures: Figures) -> float:
    """The same cost in bits per byte."""
    found = [look_up(figures, f"bypass.{name}.bits_per_byte") for name in ("none", "activations")]
    return float(found[0]) - float(found[1])


def log_speed(figures: Figures) -> float:
    """Logarithm of the tokens a second at full depth."""
    return math.log(float(look_up(figures, "speed.24")))


def log_speed_gain(figures: Figures) -> float:
    """Logarithm of the speed at exit 18 over full depth's."""
    return math.log1p(speed_gain(figures))


def cliff(figures: Figures) -> float:
    """Bits a byte that the last of 12 blocks gains over the exit before it."""
    before, last = (look_up(figures, f"exits.{n}.bits_per_byte") for n in (11, 12))
    return float(before) - float(last)


def log_mean_scale(figures: Figures) -> float:
    """Logarithm of the mean ternary scale, so that differences are of ratios."""
    return math.log(float(look_up(figures, "weights.mean_scale")))


def log_activations(figures: Figures) -> float:
    """Logarithm of the standard deviation of the residual stream after the last of 24 blocks."""
    return math.log(float(look_up(figures, "activations.24.std")))


def exit_cost_as_trained(figures: Figures) -> float:
    """Loss at exit 18 less full depth's, each of the run's own task, in nats."""
    found = [look_up(figures, f"as_trained.{n}.loss") for n in (18, 24)]
    return float(found[0]) - float(found[1])


def masked_over_unigram(figures: Figures) -> float:
    """Loss of the next token under the causal mask less that of token frequencies, in nats."""
    return float(look_up(figures, "masked.24.loss")) - float(look_up(figures, "unigram.loss"))


def _kurtosis(figures: Figures, group: str) -> float:
    return math.exp(float(look_up(figures, f"inputs.{group}.log_kurtosis")))


def kurtosis_down(figures: Figures) -> float:
    """Geometric mean of the kurtosis of a token's values before `down_proj`."""
    return _kurtosis(figures, "down")


def kurtosis_qkv(figures: Figures) -> float:
    """The same before `q_proj`, `k_proj` and `v_proj`."""
    return _kurtosis(figures, "qkv")


def status(figures: Figures) -> str:
    """Whether a model knows more of held-out text than how common each token is."""
    best, unigram = look_up(figures, "training.best_loss"), look_up(figures, "unigram.loss")
    return "Collapsed" if float(best) >= float(unigram) else "Learning"


DERIVED: dict[str, Callable[[Figures], float | str]] = {
    "ppl_increase": ppl_increase, "speed_gain": speed_gain, "status": status,
    "quality_speed_ratio": quality_speed_ratio, "optimal_exit": optimal_exit,
    "viability": viability, "ternary_cost": ternary_cost, "degradation": degradation,
    "cliff": cliff, "ternary_bits": ternary_bits, "log_speed": log_speed,
    "log_speed_gain": log_speed_gain, "log_mean_scale": log_mean_scale,
    "exit_cost_as_trained": exit_cost_as_trained, "masked_over_unigram": masked_over_unigram,
    "kurtosis_down": kurtosis_down, "kurtosis_qkv": kurtosis_qkv,
    "log_activations": log_activations,
}  # fmt: skip
