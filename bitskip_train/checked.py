"""What the parts of a checkpoint must be: its file may hold anything that is data."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitskip_ref.config import ModelConfig
from bitskip_ref.tensors import parameter_shapes
from bitskip_train.settings import TrainConfig

MOST_STEPS = 1 << 48  # and windows
MOST_TABLE = 64 << 20  # bytes of the RoPE tables, which no file's size bounds
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside `step`


class Damage(ValueError):
    """A part of a checkpoint is not what it must be; the message names it."""


def check_archive(path: str | Path) -> int:
    """The size of a checkpoint's file in bytes.

    Raises Damage unless the file is a zip archive that stores everything as it is, with the right
    checksums: reading it then takes no more memory than that. Raises OSError where there is none.
    """
    about = os.stat(path)
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(about.st_mode):
        raise Damage("no regular file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Damage("the archive is compressed")
        if sum(entry.file_size for entry in entries) > about.st_size:
            raise Damage("the archive claims more than its file holds")
        if archive.testzip() is not None:  # PyTorch does not look
            raise Damage("damaged: a checksum differs")
    return about.st_size


def check_parts(values: Mapping[str, Any], size: int) -> ModelConfig:
    """The configuration of a checkpoint's fields. Raises Damage or ConfigError unless they are what
    `checkpoint.Checkpoint` says; the optimizer's are checked by `restore_optimizer`.

    values: the fields as the file has them. size: bytes of the file.
    """
    for name in ("config", "train", "fingerprint"):
        _check_dict(name, values[name])
    config = ModelConfig.from_dict(values["config"])
    TrainConfig.from_dict(values["train"])
    for name in ("step", "position"):
        if type(values[name]) is not int or not 0 <= values[name] <= MOST_STEPS:
            raise Damage(f"{name} must be a whole number from 0")
    if type(values["best_loss"]) not in (float, type(None)):
        raise Damage("best_loss must be a number or nothing")
    if type(values["tokenizer_json"]) not in (str, type(None)):
        raise Damage("tokenizer_json must be text or nothing")
    if type(values["history"]) is not list:
        raise Damage("history must be a list")
    for entry in values["history"]:
        _check_dict("an entry of history", entry, (int, float))
        if type(entry.get("step")) is not int:
            raise Damage("an entry of history must have a step")
    if type(values["optimizer"]) not in (dict, type(None)):
        raise Damage("optimizer must be a dictionary or nothing")
    _check_state(config, values["state"], size)
    return config


def _check_dict(name: str, values: Any, kinds: tuple[type, ...] = (bool, int, float, str)) -> None:
    """Raise Damage unless values is a dictionary from text to plain values or lists of them."""
    if type(values) is not dict or any(type(key) is not str for key in values):
        raise Damage(f"{name} must be a dictionary with names")
    for key, value in values.items():
        if any(type(v) not in kinds for v in (value if type(value) is list else [value])):
            raise Damage(f"{name}: {key[:80]!r} must be a plain value")


def _check_state(config: ModelConfig, state: Any, size: int) -> None:
    """Raise Damage unless a state dict holds the configuration's parameters."""
    if not isinstance(state, dict) or any(type(name) is not str for name in state):
        raise Damage("state must be a dictionary with names")
    # First what takes no time: a file of some bytes may claim a million blocks.
    wanted = config.parameters()
    if config.num_hidden_layers > len(state) or 4 * wanted > size:
        raise Damage(f"the configuration's {wanted:,} parameters are not in it")
    if 4 * config.max_position_embeddings * config.head_dim > max(MOST_TABLE, size):
        raise Damage(
            f"max_position_embeddings = {config.max_position_embeddings:,}: too many for head_dim "
            f"= {config.head_dim}"
        )
    expected = parameter_shapes(config)
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            found = "lacks" if name in expected else "has an unknown"
            raise Damage(f"it {found} tensor {name[:80]!r}")
        check_tensor(name, state[name], expected[name])


def check_tensor(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raise Damage unless it is a plain float32 tensor of that shape, all finite."""
    if not isinstance(tensor, Tensor):
        raise Damage(f"{name[:80]} must be a tensor")
    kind = str(tensor.dtype).removeprefix("torch.")
    for wrong, word in (
        (tensor.is_nested, "nested"),
        (tensor.layout != torch.strided, "sparse"),
        (tensor.is_quantized, "quantized"),
        (tensor.is_meta, "without values (meta)"),
        (tensor.dtype != torch.float32, kind),
        (tensor.requires_grad, "asking for a gradient"),
    ):
        if wrong:
            raise Damage(f"{name[:80]} is {word}, must be plain float32")
    if tuple(tensor.shape) != shape:
        raise Damage(
            f"{name[:80]} is {list(tensor.shape)}, the configuration asks for {list(shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise Damage(f"{name[:80]} holds a value that is not finite")


def restore_optimizer(optimizer: torch.optim.AdamW, saved: Mapping[str, Any]) -> None:
    """Give an optimizer the state of a saved one; rates and decays stay its own.

    Raises Damage unless the state belongs to the optimizer's parameters.
    """
    state = saved.get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if type(state) is not dict or not state.keys() <= set(range(len(parameters))):
        raise Damage("optimizer: its state must name this model's parameters")
    for index, values in state.items():
        name = f"optimizer: {index}"
        if type(values) is not dict or values.keys() != {"step", *_MOMENTS}:
            raise Damage(f"{name} must hold step, {', '.join(_MOMENTS)}")
        check_tensor(f"{name} step", values["step"], ())
        for moment in _MOMENTS:
            check_tensor(f"{name} {moment}", values[moment], tuple(parameters[index].shape))
        if values["step"] < 0 or (values["exp_avg_sq"] < 0).any():
            raise Damage(f"{name} holds a value below 0")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
