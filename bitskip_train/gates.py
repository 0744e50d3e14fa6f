"""Routing gates fitted to a trained model (SPEC 8.4, 10 row 12); all its other weights stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitskip_ref.config import ModelConfig
from bitskip_train.data import Windows
from bitskip_train.model import BitskipModel

TOKENS = 512  # of each step's: the heads of all exits cost far more than the blocks


def with_gates(config: ModelConfig, state: Mapping[str, Tensor]) -> BitskipModel:
    """The model of a state dict, with gates; new ones, to be fitted, where it has none."""
    model = BitskipModel(config.replace(gates=True))
    model.load_state_dict(state, strict=config.gates)
    return model


def closeness(divergence: Tensor, scale: float) -> Tensor:
    """What a gate learns to expect: exp(-divergence / scale), 1 where stopping costs nothing.

    divergence f32 in nats, from `divergences`; `scale` above 0, in nats: a gate passes 1/2 where
    stopping is expected to cost less than about 0.7 of it.
    """
    return (-divergence / scale).exp()


@torch.no_grad()
def divergences(model: BitskipModel, hidden: dict[int, Tensor]) -> Tensor:
    """KL(full depth || exit n) in nats, f32 [L, N], of hidden states f32 [N, D] after n = 1..L."""
    depth = model.config.num_hidden_layers
    teacher = model.logits(hidden[depth], depth).float().log_softmax(-1)
    found = []
    for n in range(1, depth + 1):
        student = model.logits(hidden[n], n).float().log_softmax(-1)
        found.append(F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1))
    return torch.stack(found)


def fit_gates(
    model: BitskipModel,
    windows: Windows,
    *,
    steps: int,
    batch: int,
    scale: float,
    lr: float = 3e-3,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fit the gates of a model that has them, and nothing else, to the `closeness` of their exits.

    Each gate by itself, whatever the others do: so any threshold gives a sensible depth. Each step
    takes `batch` windows and at most `TOKENS` of their tokens, drawn from `seed`. `report` is told
    each step, from 1, and its loss: the mean cross-entropy of exits 1..L-1.
    """
    depth = model.config.num_hidden_layers
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    reset_gates(model, generator)
    gates = [p for i in range(depth - 1) for p in model.block(i).gate.parameters()]
    optimizer = torch.optim.AdamW(gates, lr=lr, weight_decay=0.01)
    region = torch.autocast(device.type, autocast, enabled=autocast is not None)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        ids = torch.from_numpy(windows.batch(step * batch, batch)).to(device)
        chosen = torch.randperm(ids[:, 1:].numel(), generator=generator)[:TOKENS].to(device)
        with region:
            with torch.no_grad():
                states = model(ids[:, :-1], collect=range(1, depth + 1))
            hidden = {n: h.flatten(0, 1)[chosen] for n, h in states.items()}
            target = closeness(divergences(model, hidden)[:-1], scale)
            decisions = torch.stack([model.gate_logits(hidden[n], n) for n in range(1, depth)])
        loss = F.binary_cross_entropy_with_logits(decisions, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, loss.item())


def reset_gates(model: BitskipModel, generator: torch.Generator) -> None:
    """Gates of probability 1/2 everywhere, ready to learn."""
    for i in range(model.config.num_hidden_layers):
        gate = model.block(i).gate
        nn.init.ones_(gate.norm.weight)
        nn.init.zeros_(cast(nn.Parameter, gate.norm.bias))
        nn.init.normal_(gate.fc1.weight, 0.0, gate.fc1.weight.shape[1] ** -0.5, generator=generator)
        nn.init.zeros_(gate.fc2.weight)
