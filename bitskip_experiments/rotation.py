"""A rotation before activations are quantized, in models that others and we trained.

Weights stay floats and nothing is trained: what enters the linear layers is turned, quantized to 8
or 4 bits (SPEC 4.2), and multiplied with weights turned in the same way, so that without
quantizing nothing would change. Each row of the table is a model and an order of the transform:
`none`; `padded` (SPEC 5.1); `blocks` of the power of two that divides the width, neighbours
together; `spread` blocks, of features at equal distances; `Hartley x Hadamard` (SPEC 5.3); and
that in `o and down` alone, as BitNet v2 has it. Pieces of held-out text take the place of seeds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.environment import commit, environment
from bitskip_experiments.plots import LEVELS
from bitskip_experiments.results import result_path
from bitskip_ref.config import odd_part
from bitskip_ref.files import replace_file
from bitskip_train.fast import FastOps
from bitskip_train.layers import GROUPS

if TYPE_CHECKING:
    from bitskip_experiments.subjects import Model, Piece

BITS = (8, 4)
_OPS = FastOps(torch.float32)


def _blocks(x: Tensor) -> Tensor:
    m = odd_part(x.shape[-1])
    return _hadamard(x.unflatten(-1, (m, x.shape[-1] // m))).flatten(-2)


def _spread(x: Tensor) -> Tensor:
    m = odd_part(x.shape[-1])
    grid = x.unflatten(-1, (x.shape[-1] // m, m)).transpose(-1, -2)
    return _hadamard(grid).transpose(-1, -2).flatten(-2)


def _hadamard(x: Tensor) -> Tensor:
    return _OPS.rotate(x, _OPS.rotations((x.shape[-1],), x.device))


def _hartley(x: Tensor) -> Tensor:
    return _OPS.rotate_unpadded(x, _OPS.unpadded_rotations((x.shape[-1],), x.device))


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "padded": _hadamard, "blocks": _blocks, "spread": _spread,
    "Hartley x Hadamard": _hartley, "o and down": _hartley,
}  # fmt: skip
"""Order -> f32 [..., n] -> [..., n'], linear and orthonormal."""


class TurnedOps(FastOps):
    """Float linear layers whose inputs are turned and quantized; bits 0: neither."""

    def __init__(self, groups: dict[int, str], order: str = "none", bits: int = 0) -> None:
        """groups: id of a group's first weight -> its name in `layers.GROUPS`."""
        super().__init__(torch.float32)
        self.groups, self.order, self.bits = groups, order, bits
        self.kept: dict[int, Tensor] = {}

    def float_product(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if not self.bits:
            return super().float_product(x, weights)
        key = id(weights[0])
        if key not in self.kept:
            self.kept[key] = self.turn(self.groups[key], torch.cat(list(weights)))
        codes, step = self.quantize(self.turn(self.groups[key], x), self.bits)
        return F.linear(codes * step, self.kept[key])

    def turn(self, group: str, x: Tensor) -> Tensor:
        """The inputs of a group, or its weights' rows, in the chosen order."""
        apart = self.order == "o and down" and group not in ("o", "down")
        return x if apart else ORDERS[self.order](x)


class Shapes(TurnedOps):
    """A float pass that notes how the inputs of each group are distributed in one order."""

    def __init__(self, groups: dict[int, str], orders: Sequence[str]) -> None:
        super().__init__(groups)
        self.orders = orders
        self.seen: dict[str, dict[str, list[dict[str, Any]]]] = {
            order: {name: [] for name in GROUPS} for order in orders
        }

    def float_product(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        group = self.groups[id(weights[0])]
        for order in self.orders:
            self.order = order
            self.seen[order][group].append(shape(self.turn(group, x)))
        return super().float_product(x, weights)

    def figures(self, order: str) -> dict[str, Any]:
        """Group -> means over its layers, and each layer's logarithm of the kurtosis."""
        return {
            group: {
                "log_kurtosis": float(np.mean([s["log_kurtosis"] for s in layers])),
                "log_peak": float(np.mean([s["log_peak"] for s in layers])),
                "layers": [round(s["log_kurtosis"], 4) for s in layers],
                "tail": np.mean([s["tail"] for s in layers], 0).tolist(),
            }
            for group, layers in self.seen[order].items()
        }


def shape(x: Tensor) -> dict[str, Any]:
    """How the values of a token are spread: x f32 [..., n].

    `log_kurtosis`: mean over tokens of ln(mean x^4 / (mean x^2)^2), ln 3 for normal values;
    `log_peak` of ln(largest |x| / root mean square); `tail`: the share of values beyond each of
    `LEVELS` root mean squares of their token.
    """
    x = x.flatten(0, -2)
    square = x.square().mean(-1, keepdim=True).clamp_min(1e-20)
    scaled = (x / square.sqrt()).abs()
    counts = torch.histogram(scaled.flatten(), torch.tensor([0.0, *LEVELS, math.inf]).float()).hist
    return {
        "log_kurtosis": float(scaled.pow(4).mean(-1).log().mean()),
        "log_peak": float(scaled.amax(-1).log().mean()),
        "tail": (counts.flip(0).cumsum(0).flip(0)[1:] / scaled.numel()).numpy(),
    }


def measure(experiment: Experiment, data: Path | None, work: Path, results: Path) -> None:
    """Write the result files that lack. Raises ExperimentError where a model is not at hand."""
    from bitskip_experiments.subjects import load_model

    wanted: dict[str, list[str]] = {}
    for label in experiment.labels:
        if any(not result_path(results, experiment, label, s).exists() for s in experiment.seeds):
            name, order = label.split(", ")
            wanted.setdefault(name, []).append(order)
    for name, orders in wanted.items():
        model = load_model(name, len(experiment.seeds), data, work)
        for k, piece in enumerate(model.pieces):
            _measure_piece(experiment, model, piece, k, orders, results)


@torch.no_grad()
def _measure_piece(
    experiment: Experiment, model: Model, piece: Piece, k: int, orders: list[str], results: Path
) -> None:
    places = {o: result_path(results, experiment, f"{model.name}, {o}", k) for o in orders}
    orders = [order for order in orders if not places[order].exists()]
    if not orders:
        return
    groups = model.groups()
    shapes, started = Shapes(groups, orders), time.monotonic()
    plain = model.loss(piece, shapes)
    for order in orders:
        found: dict[str, Any] = {"float": plain, "inputs": shapes.figures(order), "cost": {}}
        for bits in BITS:
            facts = model.loss(piece, TurnedOps(groups, order, bits))
            found[str(bits)] = facts
            cost = facts["bits_per_byte"] - plain["bits_per_byte"]
            found["cost"][str(bits)] = cost
        values = {
            "experiment": experiment.name, "scale": experiment.scale,
            "label": f"{model.name}, {order}", "seed": k, "figures": found,
            "model": model.config.to_dict(), "tokens": len(piece.ids) - 1, "text": model.text,
            "commit": {"measured": commit()}, "seconds": {"measuring": time.monotonic() - started},
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": environment(),
        }  # fmt: skip
        with replace_file(places[order]) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
        print(f"{places[order]}: {found['cost']}", flush=True)
