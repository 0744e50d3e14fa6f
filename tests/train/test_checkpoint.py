"""Checkpoint files: whole or unchanged, and refused when they are anything else."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bitskip.program import main
from bitskip_train import checked
from bitskip_train import checkpoint as module
from bitskip_train.checkpoint import Checkpoint, average, load_checkpoint, save_checkpoint
from bitskip_train.errors import CheckpointError
from bitskip_train.model import BitskipModel
from bitskip_train.trainer import Trainer
from tests.train.conftest import small_config, small_split, small_trainer


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
ODD_TENSORS = [
    (torch.zeros(3), r"is \[3\], the configuration asks for \[16\]"),
    (torch.zeros(16, dtype=torch.bfloat16), "is bfloat16, must be plain float32"),
    (torch.zeros(16, dtype=torch.float64), "is float64"),
    (torch.zeros(16, dtype=torch.complex64), "is complex64"),
    (torch.zeros(16).to_sparse(), "is sparse"),
    (torch.zeros(16, device="meta"), r"is without values \(meta\)"),
    (torch.full((16,), float("inf")), "holds a value that is not finite"),
    (7, "must be a tensor"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of these kinds, which torch is about to change
    ODD_TENSORS += [
        (torch.quantize_per_tensor(torch.zeros(16), 0.1, 0, torch.qint8), "is quantized"),
        (torch.nested.nested_tensor([torch.zeros(16)]), "is nested"),
        (torch.nested.nested_tensor([torch.zeros(16)], layout=torch.jagged), "is nested"),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (broken(format="bitskip-checkpoint-0"), "another checkpoint format"),
        (broken(extra=1), "damaged checkpoint"),
        (broken(config={"hidden_size": 3}), "damaged checkpoint .*missing"),
        (broken(config=None), "damaged checkpoint"),
        (broken(config={"hidden_size": torch.zeros(9, 9)}), "'hidden_size' must be a plain value"),
        (broken(config={7: 7}), "config must be a dictionary with names"),
        (broken(train={"steps": 0}), "steps = 0: must be from 1"),
        (broken(train={"data": [torch.zeros(3, 3)]}), "'data' must be a plain value"),
        (broken(fingerprint=[1]), "fingerprint must be a dictionary"),
        (broken(fingerprint={"data": {}}), "'data' must be a plain value"),
        (broken(tokenizer_json=b"{}"), "tokenizer_json must be text"),
        (broken(best_loss="1"), "best_loss must be a number"),
        (broken(optimizer=[]), "optimizer must be a dictionary"),
        (broken(history={}), "history must be a list"),
        (broken(history=[3]), "an entry of history must be a dictionary"),
        (broken(history=[{"loss": 1.0}]), "must have a step"),
        (broken(history=[{"step": 1, "loss": "low"}]), "'loss' must be a plain value"),
        (broken(state=[]), "state must be a dictionary"),
        (broken(state={}), "parameters are not in it"),
        (broken(state=STATE | {7: torch.zeros(2)}), "state must be a dictionary with names"),
        (broken(state=STATE | {"extra": torch.zeros(2)}), "has an unknown tensor 'extra'"),
        (
            broken(state={n: t for n, t in STATE.items() if n != "final_norm.weight"}),
            "it lacks tensor 'final_norm.weight'",
        ),
        *((broken(**{name: value}), f"{name} must be a whole number from 0")
          for name in ("step", "position")
          for value in ("3", -1, True, 2.0, 1 << 60, None, torch.tensor(3))),
        *((broken(state=STATE | {"final_norm.weight": tensor}), f"final_norm.weight {problem}")
          for tensor, problem in ODD_TENSORS),
    ],
)  # fmt: skip
def test_damaged_checkpoints(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    torch.save(values, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 4096}, "parameters are not in it"),
        ({"intermediate_size": 100_000}, "parameters are not in it"),
        ({"vocab_size": 1 << 24}, "parameters are not in it"),
    ],
)
def test_small_files_that_claim_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, int], message: str
) -> None:
    """Refused before anything of that size is made, even its list of names; views of one number
    can spell any shape."""

    def never(*arguments: Any) -> Any:
        raise AssertionError("the shapes were listed")

    monkeypatch.setattr(checked, "parameter_shapes", never)
    large = {name: torch.zeros(1).expand(10**9) for name in STATE}
    values = broken(config=small_config().to_dict() | config, state=large)
    torch.save(values, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_a_context_that_no_file_bounds(tmp_path: Path) -> None:
    """RoPE's tables, 512 MB here, are in no file."""
    torch.save(
        broken(config=small_config(max_position_embeddings=1 << 24).to_dict()), tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match="max_position_embeddings = 16,777,216: too many"):
        load_checkpoint(tmp_path / "a.pt")


def test_archives_that_unfold(tmp_path: Path) -> None:
    torch.save(broken(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="the archive is compressed"):
        load_checkpoint(tmp_path / "b.pt")
    content = (tmp_path / "a.pt").read_bytes()
    directory = content.index(b"PK\x01\x02")
    for at in (20, 24):  # both sizes of the first entry
        place = slice(directory + at, directory + at + 4)
        content = content[: place.start] + (1 << 30).to_bytes(4, "little") + content[place.stop :]
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims more than its file holds"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    weights = STATE["layers.2.down_proj.weight"].numpy().tobytes()
    save_checkpoint(tmp_path / "a.pt", small_checkpoint(state=STATE))
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(weights) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="a checksum differs"):
        load_checkpoint(tmp_path / "a.pt")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no regular file"):
        load_checkpoint(tmp_path / "a.pt")


def optimizer_state(**changes: Any) -> dict[str, Any]:
    """Of a step of the small model, with changes to the moments of parameter 0."""
    run = small_trainer(Path("unused"))
    run.train_step()
    saved = run.optimizer.state_dict()
    saved["state"][0] |= changes
    return saved


SHAPE = tuple(STATE["embed_tokens.weight"].shape)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "must name this model's parameters"),
        ({"state": [1]}, "must name this model's parameters"),
        ({"state": {999: {}}}, "must name this model's parameters"),
        ({"state": {"0": {}}}, "must name this model's parameters"),
        ({"state": {0: {}}}, "0 must hold step, exp_avg, exp_avg_sq"),
        (optimizer_state(more=torch.zeros(1)), "0 must hold step"),
        (optimizer_state(exp_avg=torch.zeros(3)), r"exp_avg is \[3\], .* asks for \[97, 16\]"),
        (optimizer_state(exp_avg=torch.zeros(SHAPE[::-1])), r"exp_avg is \[16, 97\]"),
        (optimizer_state(exp_avg_sq=torch.zeros(SHAPE, dtype=torch.float64)), "is float64"),
        (optimizer_state(exp_avg_sq=-torch.ones(SHAPE)), "below 0"),
        (optimizer_state(exp_avg=torch.full(SHAPE, float("nan"))), "not finite"),
        (optimizer_state(exp_avg=torch.zeros(SHAPE, device="meta")), r"without values \(meta\)"),
        (optimizer_state(exp_avg=3.0), "must be a tensor"),
        (optimizer_state(step=torch.zeros(2)), r"step is \[2\]"),
        (optimizer_state(step=torch.tensor(-1.0)), "below 0"),
        (optimizer_state(step=3), "must be a tensor"),
    ],
)
def test_an_optimizer_that_is_not_this_models(
    tmp_path: Path, saved: dict[str, Any], message: str
) -> None:
    run = small_trainer(tmp_path)
    save_checkpoint(tmp_path / "last.pt", small_checkpoint(optimizer=saved))
    loaded = load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        Trainer(run.config, run.train, small_split(), None, "{}", tmp_path, loaded)
    assert "\n" not in str(caught.value)


def test_rates_of_a_saved_optimizer_are_not_used(tmp_path: Path) -> None:
    """Only moments come from the file: a group there may hold anything."""
    saved = optimizer_state()
    for group in saved["param_groups"]:
        group |= {"lr": "high", "fused": 3, "params": []}
    run = small_trainer(tmp_path)
    loaded = small_checkpoint(optimizer=saved)
    resumed = Trainer(run.config, run.train, small_split(), None, "{}", tmp_path, loaded)
    resumed.train_step()


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
    assert result.exit_code == 2 and "none.pt" in result.output and result.output.count("\n") == 1
