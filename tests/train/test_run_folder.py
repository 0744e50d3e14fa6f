"""A run's folder: one training at a time, settings that can be used again, the same run resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_train import run_folder
from bitskip_train.checkpoint import load_checkpoint, save_checkpoint
from bitskip_train.data import Split
from bitskip_train.errors import CheckpointError, TrainingError
from bitskip_train.progress import Report
from bitskip_train.run_folder import locked
from bitskip_train.settings import TrainConfig
from bitskip_train.threads import time_threads, use_threads
from bitskip_train.trainer import Trainer, pick_device
from tests.train.conftest import small_split, small_train, small_trainer
from tests.train.test_cli import broken_off, run, train_arguments

HOLD = """
import sys, time
from pathlib import Path
from bitskip_train.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_trainings_in_one_folder(text: Path, tmp_path: Path, holder: Any) -> None:
    out = tmp_path / "run"
    result = run(*train_arguments(text, out, "steps=1"))
    assert result.exit_code == 1
    assert "another training writes there; choose another --out" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in out.iterdir()) == [run_folder.LOCK]
    # A killed process holds nothing, whatever file it left.
    holder.kill()
    holder.wait()
    assert (out / run_folder.LOCK).exists()
    assert run(*train_arguments(text, out, "steps=1")).exit_code == 0
    assert not (out / run_folder.LOCK).exists()


def test_a_lock_that_is_freed_while_another_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, then removed by its holder: locking that file would lock nothing."""
    out, lock, tried = tmp_path / "run", run_folder.lock, []

    def slow(handle: int) -> bool | None:
        if not tried:
            (out / run_folder.LOCK).unlink()
        tried.append(handle)
        return lock(handle)

    monkeypatch.setattr(run_folder, "lock", slow)
    with locked(out):
        assert len(tried) == 2 and (out / run_folder.LOCK).exists()
        with pytest.raises(TrainingError, match="another training"), locked(out):
            pass
    assert not out.exists()


def test_folders_that_hold_something_stay(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "x").touch()
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def test_sigterm_saves(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    twice = signal.SIGTERM, signal.SIGTERM  # launchers may send a second one
    assert broken_off(text, out, *twice) == 143
    assert load_checkpoint(out / "last.pt").step >= 2


def test_settings_can_be_used_again(text: Path, tmp_path: Path) -> None:
    arguments = train_arguments(text, tmp_path / "a", "steps=2", "model.hadamard=true")
    printed = run(*arguments, "--print-config")
    assert printed.exit_code == 0 and not (tmp_path / "a").exists()
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "a" / "config.toml").read_text() == printed.stdout
    common = ["train", "--token-cache", tmp_path / "cache", "--no-tensorboard"]
    again = run(*common, "--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    assert again.exit_code == 0, again.stderr
    first, second = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert (first.config, first.train) == (second.config, second.train)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    resumed = run(
        "train", "--resume", "--out", tmp_path / "a", "--print-config", "--set", "steps=9"
    )
    assert tomllib.loads(resumed.stdout)["train"]["steps"] == 9
    # A file that leaves out what has no default changes a preset, and says so.
    (tmp_path / "part.toml").write_text("[model]\nhidden_size = 32\n[train]\nsteps = 7\n")
    result = run("train", "--config", tmp_path / "part.toml", "--print-config")
    assert (result.exit_code, "missing field(s): vocab_size" in result.stderr) == (1, True)
    assert "name a --preset that the file changes" in result.stderr
    tables = tomllib.loads(
        run(
            "train", "--preset", "tiny", "--config", tmp_path / "part.toml", "--print-config"
        ).stdout
    )
    assert ModelConfig.from_dict(tables["model"]).hidden_size == 32
    assert TrainConfig.from_dict(tables["train"]).steps == 7


def other_text(path: Path) -> None:
    path.write_text(path.read_text().replace("Lily", "Anna"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "seed=9"], "seed: 9, was 0"),
        (["--set", "batch=4"], "windows a step: 4, was 2"),
        (["--set", "context=8"], "context: 8, was 16"),
        (["other text"], "other data"),
    ],
)
def test_another_run_is_not_resumed(
    text: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert run(*train_arguments(text, out, "steps=2")).exit_code == 0
    before = (out / "last.pt").read_bytes()
    if options == ["other text"]:
        other_text(text)
        options = []
    resume = ["train", "--resume", "--out", out, "--token-cache", tmp_path / "cache"]
    resume += ["--no-tensorboard", "--set", "steps=3", *options]
    result = run(*resume)
    assert (
        result.exit_code == 1 and message in result.stderr and "--accept-changes" in result.stderr
    )
    assert result.stderr.count("\n") == 1 and (out / "last.pt").read_bytes() == before
    assert run(*resume, "--accept-changes").exit_code == 0
    assert load_checkpoint(out / "last.pt").step == 3


def test_passes_may_be_shared_otherwise(tmp_path: Path) -> None:
    """Two processes of half the accumulation use the same windows: it is the same run."""
    first = small_trainer(tmp_path)
    first.train_step()
    first._save("last.pt")
    loaded = load_checkpoint(tmp_path / "last.pt")
    train = small_train(batch=6, accumulation=1)
    Trainer(first.config, train, small_split(), None, "{}", tmp_path, loaded)


def test_an_earlier_checkpoint_knows_less(tmp_path: Path) -> None:
    first = small_trainer(tmp_path)
    first.train_step()
    first._save("last.pt")
    loaded = load_checkpoint(tmp_path / "last.pt")
    other = Split(small_split().tokens[::-1], 1600)
    with pytest.raises(CheckpointError, match="other data"):
        Trainer(first.config, first.train, other, None, "{}", tmp_path, loaded)
    loaded.fingerprint = {}
    save_checkpoint(tmp_path / "last.pt", loaded)
    Trainer(
        first.config,
        first.train,
        other,
        None,
        "{}",
        tmp_path,
        load_checkpoint(tmp_path / "last.pt"),
    )


@pytest.mark.parametrize(
    ("seconds", "tried"),
    [
        ({8: 1.0, 4: 0.6, 2: 0.4, 1: 0.3}, [8, 4, 2, 1]),  # small: every thread but one costs
        ({8: 1.0, 4: 1.7}, [8, 4]),  # large: no need to know what one takes
        ({6: 0.2, 3: 0.1, 1: 0.3}, [6, 3, 1]),
        ({1: 1.0}, []),
    ],
)
def test_threads_are_measured(seconds: dict[int, float], tried: list[int]) -> None:
    """With a clock of the test's own: no test depends on speed."""
    now, before = [0.0], torch.get_num_threads()

    def run_pass() -> None:
        now[0] += seconds[torch.get_num_threads()]

    try:
        found = time_threads(run_pass, max(seconds), lambda: now[0])
    finally:
        torch.set_num_threads(before)
    assert list(found) == tried
    assert found == pytest.approx({n: seconds[n] for n in tried})


def test_measuring_changes_no_bit_and_a_resume_keeps_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seconds = {2: 3.0, 1: 1.0}

        def measured(run_pass: Any, most: int) -> dict[int, float]:
            assert most == 2
            run_pass()
            return seconds

        monkeypatch.setattr("bitskip_train.trainer.time_threads", measured)
        chosen, told = small_trainer(tmp_path, threads=0), small_trainer(tmp_path, threads=1)
        assert torch.get_num_threads() == chosen.train.threads == 1
        assert chosen.train_step() == told.train_step()
        chosen._save("last.pt")
        loaded = load_checkpoint(tmp_path / "last.pt")
        assert loaded.train["threads"] == 1
        assert all(torch.equal(v, told.model.state_dict()[n]) for n, v in loaded.state.items())
    finally:
        torch.set_num_threads(before)


def test_later_verbs_take_the_threads_of_the_run() -> None:
    before = torch.get_num_threads()
    try:
        for most, wanted, used in ((4, 2, 2), (2, 4, 2), (4, 0, 4)):
            torch.set_num_threads(most)
            use_threads(TrainConfig(threads=wanted))
            assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["meta", "mps", "cpu:1", "cuda:", "", "cuda:999", "xpu"])
def test_devices_that_cannot_train(name: str) -> None:
    with pytest.raises(ConfigError, match="device = "):
        pick_device(name)


def test_what_settings_are_when_resumed(text: Path, tmp_path: Path) -> None:
    """What --set gives holds, also where the optimizer's file has another value."""
    first = small_trainer(tmp_path)
    first.train_step()
    first._save("last.pt")
    loaded = load_checkpoint(tmp_path / "last.pt")
    changed = first.train.replace(weight_decay=0.5, beta2=0.5)
    resumed = Trainer(first.config, changed, small_split(), None, "{}", tmp_path, loaded)
    decays = [group["weight_decay"] for group in resumed.optimizer.param_groups]
    assert decays == [0.5, 0.0]
    assert {group["betas"] for group in resumed.optimizer.param_groups} == {(0.9, 0.5)}


def test_a_checkpoint_is_inspected(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*train_arguments(text, out, "steps=3", "log_every=1")).exit_code == 0
    facts = json.loads(run("inspect", out / "last.pt", "--json").stdout)
    assert (facts["step"], facts["steps"], facts["windows"], facts["resumable"]) == (3, 3, 6, True)
    assert [e["step"] for e in facts["history"]] == [1, 2, 3, 3]
    assert facts["config"]["num_hidden_layers"] == 4 and facts["train"]["context"] == 16
    assert facts["tensors"]["final_norm.weight"] == [64]
    said = run("inspect", out / "last.pt").stdout
    assert "step 3 of 3, 6 windows used; can be resumed" in said
    assert f"validation loss: {facts['best_loss']:.4f} (step 3)" in said
    assert "  embed_tokens.weight 512 x 64\n" in said and "seed = 0\n" in said
    assert "not for resuming" in run("inspect", out / "best.pt").stdout
    refused = run("inspect", tmp_path / "none.pt")
    assert (refused.exit_code, refused.stderr) == (1, f"error: {tmp_path}/none.pt: no such file\n")


def test_without_pytorch(tmp_path: Path) -> None:
    """Settings are printed; what needs it says in one line how to install it."""
    code = "import sys; sys.modules['torch'] = None; from bitskip.program import main; main()"
    (tmp_path / "a.pt").touch()

    def without(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)

    printed = without("train", "--preset", "tiny", "--print-config")
    assert printed.returncode == 0 and tomllib.loads(printed.stdout)["model"]["vocab_size"] == 512
    for words in (
        ("inspect", str(tmp_path / "a.pt")),
        ("train", "--preset", "tiny", "--data", "x", "--out", str(tmp_path / "run")),
    ):
        refused = without(*words)
        assert refused.returncode == 1 and "pip install" in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_the_log_ends_no_training(tmp_path: Path) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        with pytest.raises(OSError):
            print("x", file=full)
        report = Report(tmp_path, 3, 0, [], False)
        report.console.file = full
        report.note("a line")
        report.train(1, {"loss": 2.0, "lr": 0.1, "tokens_per_second": 5.0})
        report.close()
        with suppress(OSError):
            full.close()
    assert b'"loss": 2.0' in (tmp_path / "history.jsonl").read_bytes()
