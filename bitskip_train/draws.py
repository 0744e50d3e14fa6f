"""Random numbers of training: each sample's depend on the seed and its number alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Draws:
    """A stream for each sample of a batch: a function of (seed, its place in the order of windows).

    So neither the number of processes nor the size of a batch changes what a sample draws.
    """

    def __init__(self, seed: int, first: int, samples: int) -> None:
        """Samples number first .. first + samples - 1, counted over the whole run."""
        self._streams = [
            torch.Generator().manual_seed(mix(seed, first + i)) for i in range(samples)
        ]

    def uniform(self, *shape: int) -> Tensor:
        """The next numbers from [0, 1): f32 [samples, *shape], on the CPU."""
        return torch.stack([torch.rand(shape, generator=stream) for stream in self._streams])


def mix(*numbers: int) -> int:
    """A generator's seed from numbers of 0 or more: neighbours give unrelated draws."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
