"""Checkpoints: one file with the weights and everything needed to go on or to export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.excerpt import one_line
from bitskip_ref.files import replace_file
from bitskip_train.checked import Damage, check_archive, check_parts
from bitskip_train.errors import CheckpointError

FORMAT = "bitskip-checkpoint-1"


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Randomness and data order are functions of (seed, step), so no generator state is kept.
    """

    config: ModelConfig
    state: dict[str, Tensor]  # the model's state dict
    tokenizer_json: str | None  # the text of tokenizer.json
    train: dict[str, Any]  # TrainConfig.to_dict
    step: int  # optimizer steps done
    position: int = 0  # training windows used
    best_loss: float | None = None  # validation loss of the best evaluation so far
    history: list[dict[str, Any]] = field(default_factory=list)  # as in history.jsonl
    optimizer: dict[str, Any] | None = None  # None: for use, not for resuming
    fingerprint: dict[str, Any] = field(default_factory=dict)  # trainer.fingerprint


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; an interrupted or failing write leaves an older file as it was.

    Raises CheckpointError where it cannot be written, a full disk among others.
    """
    values = {**vars(checkpoint), "config": checkpoint.config.to_dict(), "format": FORMAT}
    try:
        with replace_file(path) as file:
            torch.save(values, file)
    except (OSError, RuntimeError) as error:  # torch hides the first behind the second
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"{path}: cannot be written ({reason})") from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Everything in it is checked, and memory is taken for no more than the file's size. Raises
    CheckpointError if the file is missing, is no checkpoint, has another format, or holds what does
    not belong to its configuration.
    """
    try:
        size = check_archive(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: a folder, not a checkpoint; give the .pt file") from None
    except Exception as error:  # zip, pickle and torch each have their own types
        raise CheckpointError(f"{path}: not a checkpoint ({one_line(error)})") from None
    if not isinstance(values, dict) or "format" not in values:
        raise CheckpointError(f"{path}: not a bitskip checkpoint (it has no 'format')")
    if values.pop("format") != FORMAT:
        raise CheckpointError(f"{path}: another checkpoint format; this version reads {FORMAT}")
    try:
        checkpoint = Checkpoint(**values)
        checkpoint.config = check_parts(vars(checkpoint), size)
    except (ConfigError, TypeError, Damage) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error})") from None
    return checkpoint


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """One with the mean of their weights, for use and not for resuming; the rest is the last one's.

    Checkpoints of one run, or of runs that went on from the same one, lie near enough to each other
    for that to help. Raises CheckpointError if they are of different models or tokenizers.
    """
    last = checkpoints[-1]
    for other in checkpoints:
        if (other.config, other.tokenizer_json) != (last.config, last.tokenizer_json):
            raise CheckpointError("the checkpoints are of different models or tokenizers")
    state = {name: torch.stack([c.state[name] for c in checkpoints]).mean(0) for name in last.state}
    return replace(last, state=state, optimizer=None)
