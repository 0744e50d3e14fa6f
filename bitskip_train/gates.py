"""Routing gates fitted to a trained model (SPEC 8.4, 10 row 12); all its other weights stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitskip_ref.config import ModelConfig
from bitskip_ref.folder import Folder, write_changed
from bitskip_ref.tensors import expected_tensors
from bitskip_train.data import Windows
from bitskip_train.evaluate import LOGIT_BUDGET
from bitskip_train.layers import Gate, Weight
from bitskip_train.loaded import TorchEngine
from bitskip_train.model import BitskipModel

KEPT = 1 << 28  # numbers of hidden states that are kept, about, two bytes each
TOGETHER = 1024  # tokens of a step


def with_gates(config: ModelConfig, state: Mapping[str, Tensor]) -> BitskipModel:
    """The model of a state dict, with gates; even ones, to be fitted, where it has none."""
    model = BitskipModel(config.replace(gates=True))
    if not config.gates:
        _even_gates(model)
    model.load_state_dict(state, strict=config.gates)
    return model


def closeness(divergence: Tensor, scale: float) -> Tensor:
    """What a gate learns to expect: exp(-divergence / scale), 1 where stopping costs nothing.

    divergence f32 in nats, from `divergences`; `scale` above 0, in nats: a gate passes 1/2 where
    stopping is expected to cost less than about 0.7 of it.
    """
    return (-divergence / scale).exp()


def of_folder(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> BitskipModel:
    """The model of a folder's tensors, in fast arithmetic, with gates to be fitted.

    Its linear layers keep their codes; embedding and heads hold their values as floats. Gates that
    it has none of are even.
    """
    model = TorchEngine(config.replace(gates=True), tensors).model
    model.arithmetic = "fast"
    for name, part in model.named_modules():
        if isinstance(part, Weight) and part.scale is not None and not name.endswith("_proj"):
            part.weight = nn.Parameter(part.weight.float() * part.scale[:, None], False)
            part.scale = None
    if not config.gates:
        _even_gates(model)
    for i in range(config.num_hidden_layers):
        model.block(i).gate.requires_grad_(True)
    return model


def _even_gates(model: BitskipModel) -> None:
    """Give a model gates that never stop at a threshold of 1/2 or more; always the same ones."""
    for i in range(model.config.num_hidden_layers):
        gate = model.block(i).gate
        gate.to_empty(device="cpu")
        reset_gate(gate, torch.Generator().manual_seed(i))


@torch.no_grad()
def divergences(
    model: BitskipModel, hidden: dict[int, Tensor], exits: Sequence[int] | None = None
) -> Tensor:
    """KL(full depth || exit n) in nats, f32 [exits, N], of hidden states f32 [N, D] after n blocks.

    exits: n = 1..L, rising; None: all of them.
    """
    depth = model.config.num_hidden_layers
    rows = max(1, LOGIT_BUDGET // model.config.vocab_size)
    found = []
    for first in range(0, len(hidden[depth]), rows):
        part = {n: x[first : first + rows] for n, x in hidden.items()}
        teacher = model.logits(part[depth], depth).float().log_softmax(-1)
        for n in exits or range(1, depth + 1):
            student = model.logits(part[n], n).float().log_softmax(-1)
            found.append(F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1))
    count = len(exits or range(depth))
    return torch.stack([torch.cat(found[i::count]) for i in range(count)])


def fit_gates(
    model: BitskipModel,
    windows: Windows,
    *,
    steps: int,
    batch: int,
    scale: float,
    layers: Sequence[int] | None = None,
    lr: float = 3e-3,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fit the gates of a model that has them, and nothing else, to the `closeness` of their exits.

    Each gate by itself, whatever the others do: so any threshold gives a sensible depth. layers:
    the blocks whose gates are fitted, 1..L-1 (None: all). The model runs once over one epoch of the
    windows, or as many as KEPT has room for, `batch` side by side; its hidden states are kept as
    bfloat16 (a gate quantizes them further). Each step takes TOGETHER of their tokens, drawn from
    `seed`. `report` is told each step, from 1, and its loss: the mean cross-entropy of these gates.
    Raises ValueError for a block without a gate that could stop.
    """
    depth = model.config.num_hidden_layers
    chosen_layers = sorted({*(range(1, depth) if layers is None else layers)})
    if not chosen_layers or not 1 <= chosen_layers[0] <= chosen_layers[-1] < depth:
        raise ValueError(f"gates after blocks {chosen_layers}: choose from 1..{depth - 1}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    fitted = [model.block(n - 1).gate for n in chosen_layers]
    for gate in fitted:
        reset_gate(gate, generator)
    gates = [p for gate in fitted for p in gate.parameters()]
    region = torch.autocast(device.type, autocast, enabled=autocast is not None)
    room = KEPT // (model.config.hidden_size * len(chosen_layers) * windows.context)
    starts = range(0, max(1, min(room, windows.per_epoch)), batch)
    size = (len(chosen_layers), len(starts) * batch * windows.context)
    kept = torch.empty(*size, model.config.hidden_size, dtype=torch.bfloat16, device=device)
    expected = torch.empty(size, device=device)
    for first in starts:
        ids = torch.from_numpy(windows.batch(first, batch)).to(device)
        with region, torch.no_grad():
            collected = model(ids[:, :-1], collect=chosen_layers)
            hidden = {n: h.flatten(0, 1) for n, h in collected.items()}
            found = divergences(model, hidden, chosen_layers)
        at = slice(first * windows.context, (first + batch) * windows.context)
        expected[:, at] = closeness(found, scale)
        for i, n in enumerate(chosen_layers):
            kept[i, at] = hidden[n]
    optimizer = torch.optim.AdamW(gates, lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        some = torch.randint(size[1], (TOGETHER,), generator=generator).to(device)
        states = zip(chosen_layers, kept[:, some].float(), strict=True)
        decisions = torch.stack([model.gate_logits(x, n) for n, x in states])
        loss = F.binary_cross_entropy_with_logits(decisions, expected[:, some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, loss.item())


def write_gates(folder: Folder, out: Path, model: BitskipModel) -> None:
    """Write a folder's model with the gates of `model`, from `of_folder`; else it keeps its bits.

    A calibrated exit is not kept: it was another model's.
    """
    names = (name for name in expected_tensors(model.config) if ".gate." in name)
    made = {name: model.get_parameter(name).detach().cpu().numpy() for name in names}
    write_changed(folder, out, model.config, made, folder.trained_exits)


def reset_gate(gate: Gate, generator: torch.Generator) -> None:
    """A gate of probability 1/2 everywhere, ready to learn."""
    nn.init.ones_(gate.norm.weight)
    nn.init.zeros_(cast(nn.Parameter, gate.norm.bias))
    nn.init.normal_(gate.fc1.weight, 0.0, gate.fc1.weight.shape[1] ** -0.5, generator=generator)
    nn.init.zeros_(gate.fc2.weight)
