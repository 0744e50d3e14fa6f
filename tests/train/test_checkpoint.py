"""Checkpoint files: whole or unchanged, and refused when they are anything else."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bitskip_train import checkpoint as module
from bitskip_train.checkpoint import Checkpoint, average, load_checkpoint, save_checkpoint
from bitskip_train.errors import CheckpointError
from bitskip_train.model import BitskipModel
from cli import main
from tests.train.conftest import small_config


def small_checkpoint(**changes: Any) -> Checkpoint:
    config = small_config()
    values = {"state": BitskipModel(config).state_dict(), "tokenizer_json": "{}", "step": 3}
    return Checkpoint(config=config, train={}, **(values | changes))


def test_round_trip(tmp_path: Path) -> None:
    saved = small_checkpoint(history=[{"step": 1, "loss": 2.0}], best_loss=1.5)
    save_checkpoint(tmp_path / "a.pt", saved)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.state.keys() == saved.state.keys()
    assert all(torch.equal(loaded.state[name], saved.state[name]) for name in saved.state)
    loaded.state = saved.state = {}
    assert loaded == saved


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, small_checkpoint(step=1))

    def fail(values: object, file: Any) -> None:
        file.write(b"half of a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"last.pt: cannot be written \(disk full\)"):
        save_checkpoint(path, small_checkpoint(step=2))
    assert load_checkpoint(path).step == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own writer, which reports something else than what the system said."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "replace_file", lambda path: contextlib.nullcontext(Full()))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(tmp_path / "last.pt", small_checkpoint(step=1))


class Hostile:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"format": module.FORMAT, "state": Hostile(tmp_path / "owned")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a folder"):
        load_checkpoint(tmp_path)
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint") as caught:
            load_checkpoint(tmp_path / "a.pt")
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a bitskip checkpoint"):
        load_checkpoint(tmp_path / "a.pt")


def broken(**changes: Any) -> dict[str, Any]:
    saved = small_checkpoint()
    values = {**vars(saved), "config": saved.config.to_dict(), "format": module.FORMAT}
    return values | changes


STATE = small_checkpoint().state


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (broken(format="bitskip-checkpoint-0"), "another checkpoint format"),
        (broken(extra=1), "damaged checkpoint"),
        (broken(config={"hidden_size": 3}), "damaged checkpoint .*missing"),
        (broken(config=None), "damaged checkpoint"),
        (broken(step="3"), "step has a wrong type"),
        (broken(state=[]), "state has a wrong type"),
        (broken(state={}), "is nothing"),
        (broken(state=STATE | {"extra": torch.zeros(2)}), r"extra is \(2,\).*asks for nothing"),
        (
            broken(state=STATE | {"final_norm.weight": torch.zeros(3)}),
            r"final_norm.weight is \(3,\), the configuration asks for \(16,\)",
        ),
        (broken(state=STATE | {"final_norm.weight": 7}), "final_norm.weight is nothing"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    torch.save(values, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_the_mean_of_checkpoints() -> None:
    weights = BitskipModel(small_config()).state_dict()
    ones, threes = (
        small_checkpoint(
            state={name: torch.full_like(w, x) for name, w in weights.items()},
            step=int(x), optimizer={},
        )
        for x in (1.0, 3.0)
    )  # fmt: skip
    mean = average([ones, threes])
    assert all((w == 2).all() and w.dtype == torch.float32 for w in mean.state.values())
    assert mean.step == 3 and mean.optimizer is None and threes.optimizer == {}
    with pytest.raises(CheckpointError, match="different models or tokenizers"):
        average([ones, small_checkpoint(tokenizer_json=None)])


def test_the_verb_average(tmp_path: Path) -> None:
    for name in "ab":
        save_checkpoint(tmp_path / f"{name}.pt", small_checkpoint())
    files = [str(tmp_path / f"{name}.pt") for name in "abc"]
    result = CliRunner().invoke(main, ["average", *files[:2], "-o", files[2]])
    assert result.exit_code == 0, result.output
    a, b, c = (load_checkpoint(file).state["final_norm.weight"] for file in files)
    assert torch.equal(c, (a + b) / 2)
    result = CliRunner().invoke(main, ["average", "none.pt", "-o", files[2]])
    assert result.exit_code == 1 and result.output == "Error: none.pt: no such file\n"
