"""Held-out loss at chosen exits (SPEC 10 rows 20 and 21)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bitskip_ref.heldout import HeldOutLoss, windows
from bitskip_train.losses import cross_entropy
from bitskip_train.readings import shifted
from bitskip_train.settings import check_exits

LOGIT_BUDGET = 1 << 25  # logits held at once (128 MB in float32)


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
    targets: str = "next",
) -> dict[int, HeldOutLoss]:
    """Exit -> loss over all tokens but the first, in order of depth.

    tokens: ids [N]. Windows of `context` inputs do not overlap (stride = context), the last may be
    shorter; the mean is over tokens, not windows. text_bytes: UTF-8 bytes of the text, for bits per
    byte; end-of-text tokens add to the loss but not to the bytes. bypass: none, weights, or
    activations (weights too). targets: see `readings.shifted`. Raises ConfigError for a wrong exit,
    ValueError below two tokens.
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
                for row, target in zip(hidden[n], shifted(ids, targets), strict=True):
                    sums[n].append(_row_loss(model, row, target, n))
    model.train(was_training)
    return {n: HeldOutLoss(np.array(s), np.array(sizes), text_bytes) for n, s in sums.items()}


def _row_loss(model: Any, hidden: torch.Tensor, targets: torch.Tensor, n: int) -> float:
    """Summed loss of one window, hidden [T, D], in pieces that fit the logit budget."""
    rows = max(1, LOGIT_BUDGET // model.config.vocab_size)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return sum(float(cross_entropy(model.logits(h[None], n)[0], t)) for h, t in pieces)


def _window_groups(count: int, context: int, batch: int) -> list[list[tuple[int, int]]]:
    """Batches of (first, last) with equal lengths; the shorter last window is its own batch."""
    cut = [(begin, end) for begin, _, end in windows(count, context, context)]
    full = [w for w in cut if w[1] - w[0] == context]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    return groups + [[w] for w in cut[len(full) :]]
