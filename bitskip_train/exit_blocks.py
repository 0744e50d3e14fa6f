"""Exit blocks fitted to a frozen model (SPEC 8.8), after Balcony (arXiv 2503.05005)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitskip_ref.config import ModelConfig
from bitskip_train.evaluate import LOGIT_BUDGET
from bitskip_train.loaded import parameter_values
from bitskip_train.losses import cross_entropy, distillation
from bitskip_train.model import BitskipModel

States = Mapping[int, np.ndarray]
"""n -> hidden states f32 [N, D] of the same N tokens after n blocks; L among them."""

TOGETHER = 512  # tokens of a step
TEXT = 0.1
"""Weight of the text's next token beside full depth's prediction: with more of it the exit's loss
is nearer full depth's, with less it names full depth's choice, which drafts live on, more often
(docs/EXITS.md)."""


def with_exit_blocks(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], exits: Sequence[int], seed: int
) -> BitskipModel:
    """What of a folder's model lies behind its hidden states, with new blocks for some exits.

    config: with these exits in `exit_blocks`. tensors: as in a model folder (FORMAT 3). Norms and
    heads hold their values as floats, and take no gradient; embedding and blocks are left out. A
    new block is drawn from `seed` and changes little at first.
    """
    with torch.device("meta"):  # shapes only: blocks run in an engine
        model = BitskipModel(config).requires_grad_(False)
    for n in (*exits, config.num_hidden_layers):
        norm, head = config.exit_names(n)
        for name in (f"{norm}.weight", f"{norm}.bias", f"{head}.weight"):
            if name in tensors:
                values = torch.from_numpy(parameter_values(config, tensors, name))
                _put(model, name, values, False)
    generator = torch.Generator().manual_seed(seed)
    for n in exits:
        at = f"exits.{n}.block"
        for name, shape in config.exit_block_shapes().items():
            std = shape[1] ** -0.5 * (0.1 if name == "down_proj" else 1.0)
            weight = torch.empty(shape).normal_(0.0, std, generator=generator)
            _put(model, f"{at}.{name}.weight", weight, True)
        for name, width in config.exit_block_norms().items():
            _put(model, f"{at}.{name}.weight", torch.ones(width), True)
            if config.norm == "layer":
                _put(model, f"{at}.{name}.bias", torch.zeros(width), True)
    return model


def _put(model: nn.Module, name: str, values: Tensor, fitted: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(values, fitted))


def parameters(model: BitskipModel, n: int) -> dict[str, nn.Parameter]:
    """Name under FORMAT 3 -> f32 parameter of the block of exit n."""
    at = f"exits.{n}.block"
    return {f"{at}.{name}": p for name, p in model.get_submodule(at).named_parameters()}


def loss_of_exit(
    model: BitskipModel, n: int, states: States, targets: np.ndarray, learn: bool = False
) -> float:
    """Mean over tokens, in nats, of KL(full depth || exit n) + TEXT * the exit's cross-entropy.

    targets: int64 [N], the token after each of `states`. learn: with its gradient, added up.
    """
    depth, total, count = model.config.num_hidden_layers, 0.0, len(states[n])
    rows = max(1, LOGIT_BUDGET // model.config.vocab_size)
    for start in range(0, count, rows):
        hidden, last = (torch.from_numpy(states[i][start : start + rows]) for i in (n, depth))
        with torch.set_grad_enabled(learn):
            teacher = model.logits(last, depth)
            logits, wanted = model.logits(hidden, n), targets[start : start + rows]
            named = cross_entropy(logits, torch.from_numpy(wanted))
            loss = (distillation(logits, teacher) + TEXT * named) / count
            if learn:
                loss.backward()
        total += loss.item()
    return total


def fit_exit_blocks(
    model: BitskipModel,
    exits: Sequence[int],
    learned: tuple[States, np.ndarray],
    held_back: tuple[States, np.ndarray],
    *,
    steps: int,
    seed: int,
    lr: float = 1e-2,
    report: Callable[[int, dict[int, float]], None] = lambda step, found: None,
) -> dict[int, dict[str, np.ndarray]]:
    """Fit the blocks of some exits to what full depth says, and to the text; each by itself.

    learned: the states of tokens to learn from, and the token after each, int64 [N]; a step takes
    TOGETHER of them, drawn from `seed`. held_back: those that choose: at first and after every
    tenth of the steps each exit's loss on them (`loss_of_exit`) is measured and told to `report`
    with the steps made, and the block with the least is taken. Returns for each exit name -> f32
    parameter.
    """
    fitted = {n: parameters(model, n) for n in exits}
    optimizer = torch.optim.AdamW(
        [p for found in fitted.values() for p in found.values()],
        lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip
    best = dict.fromkeys(exits, float("inf"))
    chosen: dict[int, dict[str, np.ndarray]] = {}

    def judge(step: int) -> None:
        found = {n: loss_of_exit(model, n, *held_back) for n in exits}
        for n in exits:
            if found[n] < best[n]:
                best[n] = found[n]
                values = {name: p.detach().numpy().copy() for name, p in fitted[n].items()}
                chosen[n] = values
        report(step, found)

    judge(0)
    generator = np.random.default_rng(seed)
    states, targets = learned
    warmup, every = max(1, steps // 20), max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * (1 - step / steps)
        drawn = generator.integers(len(targets), size=TOGETHER)
        some = {n: values[drawn] for n, values in states.items()}
        optimizer.zero_grad()
        for n in exits:
            loss_of_exit(model, n, some, targets[drawn], learn=True)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            judge(step + 1)
    return chosen
