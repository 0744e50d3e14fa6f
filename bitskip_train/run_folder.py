"""A run's folder: one training at a time, and its settings for people to read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bitskip_ref.config import ModelConfig
from bitskip_ref.files import lock, replace_file
from bitskip_train.described import to_toml
from bitskip_train.errors import TrainingError
from bitskip_train.settings import TrainConfig

CONFIG = "config.toml"
LOCK = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if missing; no other process can hold it meanwhile.

    The system frees it however this process ends. Raises TrainingError if it is held. A folder that
    is still empty at the end is removed if it was made here.
    """
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    file = _locked_file(path)
    if file is None:
        raise TrainingError(f"{out}: another training writes there; choose another --out or wait")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock ends: whoever waits for it sees that it is gone
        file.close()
        if not existed:
            with suppress(OSError):  # it holds something
                out.rmdir()


def _locked_file(path: Path) -> IO[bytes] | None:
    """The lock's file, open and locked; None if another process has it."""
    while True:
        file = path.open("ab")
        if lock(file.fileno()) is False:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder removed it between our opening and locking


def write_config(out: Path, model: ModelConfig, train: TrainConfig) -> Path:
    """Write a run's settings where people and `train --config` find them; returns the file."""
    with replace_file(out / CONFIG) as file:
        file.write(to_toml(model, train).encode())
    return out / CONFIG
