"""Damaged checkpoints: how a case is written, and what is then done with it."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.config import ModelConfig
from tests.fuzz.mutations import ODD, mutate_bytes, mutate_tree
from tests.helpers import twin
from tests.text.tokenizers_of_all_kinds import KINDS

BLOCKS = [1, 1, 1, 2]  # of models of checkpoints; the time goes into the number of tensors


def _checkpoint(blocks: int) -> dict[str, Any]:
    """What a small run writes, as plain values."""
    import torch

    from bitskip_train.model import BitskipModel
    from bitskip_train.settings import TrainConfig
    from bitskip_train.trainer import make_optimizer

    config: ModelConfig = twin("tiny").replace(
        vocab_size=16, hidden_size=8, num_hidden_layers=blocks
    )
    torch.manual_seed(0)
    model, train = BitskipModel(config), TrainConfig(steps=4, context=8)
    optimizer = make_optimizer(model, train)
    loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    torch.autograd.backward(loss)
    optimizer.step()
    return {
        "format": "bitskip-checkpoint-1", "config": config.to_dict(), "state": model.state_dict(),
        "tokenizer_json": KINDS["words"]().to_str(), "train": train.to_dict(), "step": 1,
        "position": 1, "best_loss": 2.5, "history": [{"step": 1, "loss": 2.5}],
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip


def prepare(root: Path) -> None:
    import torch

    for blocks in BLOCKS:
        torch.save(_checkpoint(blocks), root / f"{blocks}.pt")


def _odd_tensor(draw: random.Random, like: Any) -> Any:
    """A tensor that should not be there, or nearly fits."""
    import torch

    whole = like if isinstance(like, torch.Tensor) else torch.zeros(3)
    kinds: list[Callable[[], Any]] = [
        lambda: torch.zeros(3), lambda: torch.zeros(0), lambda: torch.zeros(()),
        lambda: whole.to(torch.bfloat16), lambda: whole.to(torch.int8), lambda: whole.double(),
        lambda: whole.to(torch.complex64), lambda: whole.bool(), lambda: whole.half(),
        lambda: whole.to("meta"), lambda: whole.to_sparse(), lambda: whole * float("nan"),
        lambda: whole * float("inf"), lambda: whole.flatten(), lambda: whole.t(),
        lambda: whole.unsqueeze(0), lambda: torch.zeros(1).expand(whole.shape),
        lambda: whole.to(torch.float8_e4m3fn), lambda: torch.nested.nested_tensor([whole, whole]),
        lambda: torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8), lambda: whole.tolist(),
        lambda: torch.nn.Parameter(whole.float()), lambda: -whole, lambda: draw.choice(ODD),
    ]  # fmt: skip
    try:
        return draw.choice(kinds)()
    except (RuntimeError, NotImplementedError):
        return torch.zeros(2)


@functools.cache
def _loaded(whole: Path) -> dict[str, Any]:
    """The undamaged checkpoint, read once per process."""
    import torch

    values: dict[str, Any] = torch.load(whole, weights_only=True)
    return values


def _with_own_containers(value: Any) -> Any:
    """The value with dictionaries and lists of its own; no tensor is changed in place."""
    if isinstance(value, dict):
        return {key: _with_own_containers(part) for key, part in value.items()}
    return [_with_own_containers(part) for part in value] if type(value) is list else value


def write(draw: random.Random, prepared: Path, out: Path) -> None:
    import torch

    whole, target = prepared / f"{draw.choice(BLOCKS)}.pt", out / "last.pt"
    if draw.random() < 0.15:
        target.write_bytes(mutate_bytes(draw, whole.read_bytes()))
        return
    values = _with_own_containers(_loaded(whole))
    parts = draw.choices(["state", "optimizer", "all", "all"], k=draw.choice([1, 1, 2]))
    if "optimizer" not in parts and draw.random() < 0.7:
        values["optimizer"] = None  # three tensors of four, most of the time
    for part in parts:
        if part == "state":
            key = draw.choice(list(values["state"]))
            values["state"][key] = _odd_tensor(draw, values["state"].get(key))
        elif part == "optimizer" and isinstance(values["optimizer"], dict):
            _damage_optimizer(draw, values["optimizer"])
        else:
            values = _damage_values(draw, values)
            break
    try:
        torch.save(values, target)
    except Exception:  # torch cannot save all that one can think of
        target.write_bytes(b"")


def _damage_optimizer(draw: random.Random, optimizer: dict[str, Any]) -> None:
    states, groups = optimizer.get("state"), optimizer.get("param_groups")
    kind = draw.randrange(3)
    if kind == 0 and isinstance(states, dict) and states:
        of = states[draw.choice(list(states))]
        key = draw.choice(["exp_avg", "exp_avg_sq", "step"])
        of[key] = _odd_tensor(draw, of.get(key))
    elif kind == 1 and isinstance(groups, list) and groups:
        group = draw.choice(groups)
        if isinstance(group, dict):  # it was damaged before
            group[draw.choice([*group, "extra"])] = copy.deepcopy(draw.choice(ODD))
    else:
        optimizer[draw.choice(["state", "param_groups", "extra"])] = draw.choice(ODD)


def _damage_values(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in values.items() if k not in ("state", "optimizer")}
    changed = mutate_tree(draw, plain)
    if not isinstance(changed, dict) or draw.random() < 0.05:
        return changed
    return {**changed, **{k: values[k] for k in ("state", "optimizer") if draw.random() < 0.97}}


def use(out: Path) -> str:
    from bitskip_export.pack import export_checkpoint
    from bitskip_train.checkpoint import load_checkpoint
    from bitskip_train.errors import TrainingError

    try:
        loaded = load_checkpoint(out / "last.pt")
    except ValueError:
        return "refused"
    used = "used"
    for further in (
        lambda: export_checkpoint(out / "last.pt", out / "model"),
        lambda: _resume(loaded, out),
    ):
        try:
            further()
        except (ValueError, TrainingError):
            used = "refused"
    return used


def _resume(loaded: Any, out: Path) -> None:
    """A step of training from there, as `train --resume` takes it."""
    from bitskip_train.data import Split
    from bitskip_train.settings import TrainConfig
    from bitskip_train.trainer import Trainer
    from bitskip_train.world import World

    settings = TrainConfig.from_dict(loaded.train)
    if settings.context > 64 or settings.batch > 8 or settings.accumulation > 8:
        return
    tokens = np.arange(300, dtype=np.uint16) % loaded.config.vocab_size
    split = Split(tokens, 300)
    trainer = Trainer(
        loaded.config,
        settings,
        split,
        None,
        loaded.tokenizer_json,
        out / "run",
        loaded,
        World(),
        accept_changes=True,
    )
    trainer.train_step()
