"""How many threads train fastest: measured, as small models lose by every thread but the first."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bitskip_train.settings import TrainConfig

PASSES = 3
ENOUGH_S = 1.0


def time_threads(
    run_pass: Callable[[], None], most: int, clock: Callable[[], float] = time.monotonic
) -> dict[int, float]:
    """Numbers of threads -> seconds of a pass, the least of a few: `most`, half of that, ...

    It goes on to fewer threads while they are faster, and leaves PyTorch set to the last number
    tried. Empty if `most` is 1: there is no choice.
    """
    times: dict[int, float] = {}
    threads = most if most > 1 else 0
    while threads:
        torch.set_num_threads(threads)
        found: list[float] = []
        while len(found) < PASSES and sum(found) < ENOUGH_S:
            started = clock()
            run_pass()
            found.append(clock() - started)
        slower = bool(times) and min(found) > min(times.values())
        times[threads] = min(found)
        threads = 0 if slower else threads // 2
    return times


def use_threads(train: TrainConfig) -> None:
    """Give PyTorch the threads that a run had, as far as this machine has them."""
    if train.threads:
        torch.set_num_threads(min(train.threads, torch.get_num_threads()))
