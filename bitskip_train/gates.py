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

TOKENS = 1024  # of each step's: the heads of all exits cost far more than the blocks


def with_gates(config: ModelConfig, state: Mapping[str, Tensor]) -> BitskipModel:
    """The model of a state dict, with gates; new ones, to be fitted, where it has none."""
    model = BitskipModel(config.replace(gates=True))
    model.load_state_dict(state, strict=config.gates)
    return model


def expected_cost(gates: Tensor, divergence: Tensor, price: float) -> Tensor:
    """What a token costs on average if after each block its gate decides; a scalar.

    gates [L - 1, N]: arguments of the sigmoids after blocks 1..L-1; divergence [L, N]: nats that
    the prediction at each exit is away from full depth's. Stopping after block n costs its
    divergence and `price` * n / L.
    """
    depth = len(divergence)
    layers = torch.arange(1, depth + 1, device=gates.device)[:, None]
    going_on = F.logsigmoid(-gates).cumsum(0)  # log-probability of running block 2..L
    reached = torch.cat([torch.zeros_like(gates[:1]), going_on])
    stopping = torch.cat([F.logsigmoid(gates), torch.zeros_like(gates[:1])])
    return ((reached + stopping).exp() * (divergence + price * layers / depth)).sum(0).mean()


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
    price: float,
    lr: float = 3e-3,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    report: Callable[[int, float], None] = lambda step, cost: None,
) -> None:
    """Fit the gates of a model that has them, and nothing else, by `expected_cost`.

    Each step takes `batch` windows and at most `TOKENS` of their tokens, drawn from `seed`.
    `report` is told each step, from 1, and its cost.
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
            distance = divergences(model, hidden)
            decisions = torch.stack([model.gate_logits(hidden[n], n) for n in range(1, depth)])
        cost = expected_cost(decisions, distance, price)
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        report(step + 1, cost.item())


def reset_gates(model: BitskipModel, generator: torch.Generator) -> None:
    """Gates of probability 1/2 everywhere, ready to learn."""
    for i in range(model.config.num_hidden_layers):
        gate = model.block(i).gate
        nn.init.ones_(gate.norm.weight)
        nn.init.zeros_(cast(nn.Parameter, gate.norm.bias))
        nn.init.normal_(gate.fc1.weight, 0.0, gate.fc1.weight.shape[1] ** -0.5, generator=generator)
        nn.init.zeros_(gate.fc2.weight)
