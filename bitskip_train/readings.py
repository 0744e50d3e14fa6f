"""Readings of the papers that the definition does not follow, kept to be compared (SPEC 10).

They exist in training's arithmetic alone: no other engine runs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitskip_train.fast import FastOps, Rotations


class UnscaledOps(FastOps):
    """SPEC 10 row 5: a transform with entries +-1, so that its output is sqrt(n) times larger."""

    def rotate(self, x: Tensor, rotations: Rotations) -> Tensor:
        turned = super().rotate(x, rotations)
        return turned * math.sqrt(turned.shape[-1])


class AfterOps(FastOps):
    """SPEC 10 row 5: activations are quantized first, and the quantized values transformed."""

    def rotations(self, widths: Sequence[int], device: torch.device) -> Rotations:
        self.found = super().rotations(widths, device)
        return self.found

    def rotate(self, x: Tensor, rotations: Rotations) -> Tensor:
        return x

    def quantize(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        codes, step = super().quantize(x, bits)
        return super().rotate(codes, self.found), step


FORMS: dict[str, type[FastOps]] = {
    "definition": FastOps,
    "unscaled": UnscaledOps,
    "after": AfterOps,
}


def shifted(ids: Tensor, targets: str) -> Tensor:
    """What each of T positions is to name: ids [B, T + 1] -> [B, T].

    `next`: the token that follows. `same` (SPEC 10 row 21): the token it is given, which a model
    sees; a loss near 0 says nothing there.
    """
    return ids[:, 1:] if targets == "next" else ids[:, :-1]
