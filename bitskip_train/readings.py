"""Readings of the papers that the definition does not follow, kept to be compared (SPEC 10).

They exist in training's arithmetic alone: no other engine runs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitskip_train.fast import FastOps, Rotations
from bitskip_train.settings import TrainConfig


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


class OutputOps(FastOps):
    """SPEC 10 row 5: a transform before o and down alone (BitNet v2, arXiv 2504.18415)."""

    def turns(self, group: str) -> bool:
        return group in ("o", "down")


class PublicOps(FastOps):
    """SPEC 10 row 23: BitLinear of the authors' public code, squared ReLU on every output."""

    def finish(self, y: Tensor, rotations: Rotations) -> Tensor:
        return self.relu2(y)


class PublicHadamardOps(AfterOps):
    """SPEC 10 row 23: H-BitLinear of that code: quantize, transform with entries +-1, multiply,
    transform the output in the same way. (Its layer norm is the model's `sub_norm`.)"""

    def rotations(self, widths: Sequence[int], device: torch.device) -> Rotations:
        self.found = {
            n: tuple(h * math.sqrt(len(h)) for h in factors)
            for n, factors in FastOps.rotations(self, widths, device).items()
        }
        return self.found

    def finish(self, y: Tensor, rotations: Rotations) -> Tensor:
        return FastOps.rotate(self, y, rotations)


FORMS: dict[str, type[FastOps]] = {
    "definition": FastOps,
    "unscaled": UnscaledOps,
    "after": AfterOps,
    "o_down": OutputOps,
}


FORWARD = ("hadamard_form", "linear_form", "mask")
"""The settings above that change what a trained model computes."""


def public_init(model: nn.Module, hadamard: bool) -> None:
    """SPEC 10 row 23: linear layers uniform within 1 / sqrt(in), a tenth of it in BitLinear.

    In place, from PyTorch's global generator; other weights stay as they are.
    """
    for name, parameter in model.named_parameters():
        if "_proj." in name:
            bound = (1.0 if hadamard else 0.1) / math.sqrt(parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound)


def operations(train: TrainConfig, hadamard: bool) -> type[FastOps]:
    """The linear layers' operations in the reading that these settings name."""
    if train.linear_form == "public":
        return PublicHadamardOps if hadamard else PublicOps
    return FORMS[train.hadamard_form]


def departures(train: Mapping[str, Any]) -> list[str]:
    """Those of a checkpoint's settings with which no engine runs its model, as `name = value`."""
    usual = TrainConfig().to_dict()
    return [f"{n} = {train[n]!r}" for n in FORWARD if train.get(n, usual[n]) != usual[n]]


def shifted(ids: Tensor, targets: str) -> Tensor:
    """What each of T positions is to name: ids [B, T + 1] -> [B, T].

    `next`: the token that follows. `same` (SPEC 10 row 21): the token it is given, which a model
    sees; a loss near 0 says nothing there.
    """
    return ids[:, 1:] if targets == "next" else ids[:, :-1]
