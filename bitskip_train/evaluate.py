"""Held-out loss at chosen exits (SPEC 10 rows 20 and 21)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitskip_ref.config import ConfigError
from bitskip_train.losses import cross_entropy

LOGIT_BUDGET = 1 << 25  # logits held at once (128 MB in float32)


@dataclass(frozen=True)
class ExitResult:
    """Loss of one exit over a whole split."""

    exit_layer: int
    tokens: int  # predicted tokens
    loss: float  # nats per token, weighted by tokens
    deviation: float  # standard error of the loss, over windows
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "perplexity": self.perplexity}


def check_exits(exits: Sequence[int], layers: int) -> list[int]:
    """The exits in order without repeats. Raises ConfigError if one is not in 1..L."""
    for n in exits:
        if not 1 <= n <= layers:
            raise ConfigError(f"exit layer {n}: must be within 1..{layers}")
    return sorted(set(exits))


@torch.no_grad()
def evaluate(
    model: Any,
    tokens: np.ndarray,
    text_bytes: int,
    *,
    context: int,
    exits: Sequence[int],
    batch: int = 8,
    bypass: str = "none",
    autocast: torch.dtype | None = None,
) -> list[ExitResult]:
    """Loss at each exit over all tokens but the first; one result per exit.

    tokens: ids [N]. Windows of `context` inputs do not overlap (stride = context), the last may be
    shorter; the mean is over tokens, not windows. text_bytes: UTF-8 bytes of the text, for bits per
    byte; end-of-text tokens add to the loss but not to the bytes. bypass: none, weights, or
    activations (weights too). Raises ConfigError for a wrong exit, ValueError below two tokens.
    """
    exits = check_exits(exits, model.config.num_hidden_layers)
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} token(s): evaluation needs at least 2")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[int, list[float]] = {n: [] for n in exits}
    sizes: list[int] = []
    for group in _window_groups(len(tokens), context, batch):
        ids = torch.from_numpy(np.stack([tokens[a : b + 1] for a, b in group]).astype(np.int64)).to(
            device
        )
        sizes += [b - a for a, b in group]
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            hidden = model(ids[:, :-1], exit_layer=max(exits), collect=exits, bypass=bypass)
            for n in exits:
                for row, target in zip(hidden[n], ids[:, 1:], strict=True):
                    sums[n].append(_row_loss(model, row, target, n))
    model.train(was_training)
    predicted = len(tokens) - 1
    results = []
    for n in exits:
        total = math.fsum(sums[n])
        loss = total / predicted
        # Windows are the independent units; a ratio estimate's standard error over them.
        residual = np.array(sums[n]) - loss * np.array(sizes)
        spread = math.sqrt(float((residual**2).sum()) * len(sizes) / max(1, len(sizes) - 1))
        bits = total / math.log(2) / max(1, text_bytes)
        results.append(ExitResult(n, predicted, loss, spread / predicted, bits))
    return results


def _row_loss(model: Any, hidden: torch.Tensor, targets: torch.Tensor, n: int) -> float:
    """Summed loss of one window, hidden [T, D], in pieces that fit the logit budget."""
    rows = max(1, LOGIT_BUDGET // model.config.vocab_size)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return sum(float(cross_entropy(model.logits(h[None], n)[0], t)) for h, t in pieces)


def _window_groups(count: int, context: int, batch: int) -> list[list[tuple[int, int]]]:
    """Batches of (first, last) with equal lengths; the shorter last window is its own batch."""
    windows = [(a, min(a + context, count - 1)) for a in range(0, count - 1, context)]
    full = [w for w in windows if w[1] - w[0] == context]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    return groups + [[w] for w in windows[len(full) :]]
