"""The terms of the training loss (v1 Eq. 5 and 6; v2 Eq. 4 and 7 to 9; SPEC 10 rows 11 to 14)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitskip_ref.config import ConfigError
from bitskip_train.fast import FastOps, ternary_codes
from bitskip_train.settings import TrainConfig
from bitskip_train.soft_targets import Soft

PIECE = 1 << 18  # logits of a piece: 1 MB in float32


def exit_weights(train: TrainConfig, layers: int) -> dict[int, float]:
    """Exit n (executed blocks) -> weight in the early-exit loss; the weights sum to 1.

    v1 Eq. 6: exits 1..L-1, `linear`, n + 1. v2 Eq. 4: exits 1..L (its l + 1), `inverse`, 1 / n.
    `triangular` n (n + 1) / 2 follows LayerSkip; `exit_shares` takes the place of all of them.
    Raises ConfigError for exits outside 1..L.
    """
    last = train.exit_last if train.exit_last > 0 else layers + train.exit_last
    exits = train.exit_layers or tuple(range(train.exit_first, last + 1))
    if not exits or max(exits) > layers:
        raise ConfigError(
            f"exits {list(exits) or f'{train.exit_first}..{last}'}: must be within 1..{layers}; "
            "set exit_first and exit_last, or exit_layers"
        )
    weigh: Callable[[int], float] = {
        "linear": lambda n: n + 1.0,
        "inverse": lambda n: 1.0 / n,
        "triangular": lambda n: n * (n + 1) / 2,
        "uniform": lambda n: 1.0,
    }[train.exit_weights]
    raw = dict(zip(exits, train.exit_shares or map(weigh, exits), strict=True))
    return {n: raw[n] / sum(raw.values()) for n in sorted(exits)}


def exit_subset(weights: dict[int, float], count: int, step: int) -> dict[int, float]:
    """The exits used in one step, with their weights there.

    `count` exits at even distances, moved by one each step: in as many steps as there are exits
    each is used `count` times, and weights are raised by exits / count, so the mean over a round is
    the full loss. Even distances keep a step's total weight near 1. 0: all exits.
    """
    exits = list(weights)
    if count == 0 or count >= len(exits):
        return weights
    chosen = [exits[(step + j * len(exits) // count) % len(exits)] for j in range(count)]
    return {n: weights[n] * len(exits) / count for n in sorted(chosen)}


def peak_loss(peaks: Sequence[Sequence[Tensor]], first: int, rest: float) -> Tensor:
    """Mean of the peaks (`layers.peak`) of the first lists, 0: of all, + rest * that of the others.

    A list is a block's; one that ran for no sample has none.
    """
    first = first or len(peaks)
    total = torch.zeros(())
    for weight, blocks in ((1.0, peaks[:first]), (rest, peaks[first:])):
        if found := [peak for block in blocks for peak in block]:
            total = total + weight * torch.stack(found).mean()
    return total


class _CrossEntropy(torch.autograd.Function):
    """The loss and, at once, its gradient, in pieces that stay in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, soft: Soft | None) -> Tensor:
        rows, vocabulary = logits.shape
        if logits.device.type == "cpu":
            rows = max(1, PIECE // vocabulary)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), device=logits.device)
        for first in range(0, len(logits), rows):
            piece = slice(first, first + rows)
            logs = F.log_softmax(logits[piece].float(), -1)
            named = targets[piece, None]
            weights = logs.new_ones(1, 1).expand_as(named)
            if soft is not None:
                weights = 1 - soft.probabilities[piece].sum(1, keepdim=True)
                named = torch.cat((named, soft.ids[piece]), 1)
                weights = torch.cat((weights, soft.probabilities[piece]), 1)
            total -= (logs.gather(1, named) * weights).sum()
            if gradient is not None:
                gradient[piece] = logs.exp_().scatter_add_(1, named, -weights)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # once: it is scaled where it lies
        return gradient.mul_(grads[0]), None, None


def cross_entropy(logits: Tensor, targets: Tensor, soft: Soft | None = None) -> Tensor:
    """Summed next-token loss in nats. logits [N, V], targets int64 [N]; computed in float32.

    soft: a teacher's part of the targets; the text's token has what its rows leave of 1.
    """
    return _CrossEntropy.apply(logits, targets, soft)


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Summed KL(teacher || exit) in nats. Both are logits [N, V]; the teacher is detached."""
    return F.kl_div(
        F.log_softmax(logits.float(), dim=-1),
        F.log_softmax(teacher.detach().float(), dim=-1),
        reduction="sum",
        log_target=True,
    )


def sample_exits(probability: Tensor, uniform: Tensor) -> Tensor:
    """Bernoulli decisions, 0 or 1, whose gradient is that of the probability (straight-through).

    uniform: draws from [0, 1) of the same shape, on any device.
    """
    decision = (uniform.to(probability.device) < probability.detach()).to(probability.dtype)
    return decision + (probability - probability.detach())


def mean_exit_layer(gates: Sequence[Tensor], leftover: str) -> Tensor:
    """The mean over tokens of the layer where they stop, counted from 0 as in v2; a scalar.

    gates: for each of the L blocks, exit decisions or probabilities [B, T]. What never exits counts
    as layer L - 1 (`last`) or adds nothing (`zero`).
    """
    stay = torch.ones_like(gates[0])
    mean_layer = torch.zeros_like(gates[0])
    for layer, gate in enumerate(gates):
        mean_layer = mean_layer + layer * gate * stay
        stay = stay * (1 - gate)
    if leftover == "last":
        mean_layer = mean_layer + (len(gates) - 1) * stay
    return mean_layer.mean()


def route_loss(mean_layer: Tensor, layers: int) -> Tensor:
    """v2 Eq. 9: squared distance of the mean exit layer from L / 2; a scalar.

    The exit layer is averaged over the tokens of a pass before squaring: the model is to exit at
    the target on average, not with each token.
    """
    return (mean_layer - layers / 2) ** 2


def quant_loss(weights: Iterable[Tensor], reduction: str) -> Tensor:
    """v2 Eq. 8: squared distance between weights and their ternary values (SPEC 4.1); a scalar.

    weights: the matrix of each ternary layer. `mean`: over all weights. `sum`: summed within a
    layer, averaged over layers (Eq. 8 to the letter). The ternary values are constants here:
    through a straight-through estimator the gradient would be zero.
    """
    ops, sums, counts = FastOps(), [], []
    for weight in weights:
        with torch.no_grad():
            alpha = ops.weight_scale(weight)
            value = ternary_codes(weight, alpha) * alpha
        sums.append((weight - value).square().sum())
        counts.append(weight.numel())
    return torch.stack(sums).sum() / (sum(counts) if reduction == "mean" else len(counts))
