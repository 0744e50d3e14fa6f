"""What depends on the step alone: learning rate, layer-dropout probabilities, curricula."""

from __future__ import annotations

import math

from bitskip_train.settings import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of step 0 .. steps - 1.

    All schedules rise linearly over `warmup` steps, so that step `warmup - 1` has `lr`. Then
    `linear` and `cosine` fall to `min_lr`, reached one step after the last; `wsd` stays at `lr`
    and falls linearly over the last `decay` part of the steps.
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    start = train.warmup
    if train.schedule == "wsd":
        start = max(start, train.steps - round(train.steps * train.decay))
    if step < start:
        return train.lr
    done = min(1.0, (step - start) / max(1, train.steps - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done
    return train.min_lr + (train.lr - train.min_lr) * left


def dropout_probabilities(train: TrainConfig, layers: int, step: int | None = None) -> list[float]:
    """Probability that each of the L blocks is skipped for a sample (SPEC 10 row 10).

    `v1` (3.3): p_max (l / L)^2 for l = 1..L, scaled so that they sum to 1; p_max cancels, so any
    `dropout_max` above 0 gives the same. `v2` (Eq. 5): p_max (l / L)^2 for l = 0..L-1, unscaled.
    The last block's is then set to 0. With a step, all are multiplied by `dropout_ramp`'s ramp, and
    0 from step `dropout_until` on.
    """
    ended = step is not None and 0 < train.dropout_until <= step
    if train.dropout_max == 0 or ended:
        return [0.0] * layers
    first = 1 if train.dropout_form == "v1" else 0
    p = [train.dropout_max * ((i + first) / layers) ** 2 for i in range(layers)]
    if train.dropout_form == "v1":
        total = sum(p)
        p = [x / total for x in p]
    p[-1] = 0.0
    if step is not None:
        p = [x * ramp(train.dropout_ramp, step) for x in p]
    return p


def ramp(length: int, step: int) -> float:
    """What a curriculum multiplies by: from 0 at step 0 to 1 at step `length` and after."""
    return min(1.0, step / length) if length else 1.0
