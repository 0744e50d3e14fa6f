"""SIGKILL at any moment, then --resume: the weights of a run that was left alone, to the bit."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bitskip_train.checkpoint import load_checkpoint

PRELOADED = ["bitskip_train.trainer", "bitskip_train.cli", "cli"]  # children start at once
SETTINGS = """
[model]
hidden_size = 16
intermediate_size = 24
gates = true
[train]
threads = 1
tokenizer = "bpe:300"
context = 8
batch = 3
accumulation = 2
lr = 1e-2
warmup = 5
exit_subset = 2
dropout_max = 0.9
dropout_form = "v2"
route_lambda = 0.2
quant_lambda = 0.05
eval_every = 3
eval_tokens = 60
eval_exits = [2]
patience = 1000
save_every = 2
log_every = 1
"""


def train(arguments: list[str], kill_at: int, mode: str, seed: int) -> None:
    """In a process of its own: the verb `train`, which dies in the step after `kill_at` (0: never).

    mode `thread`: whatever is done at a random time from there on. `file`: amid the next
    checkpoint, after a random part of it.
    """
    from bitskip.program import main
    from bitskip_train import checkpoint, trainer

    rng = random.Random(seed)
    die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    step, save = trainer.Trainer.train_step, torch.save
    began = 0.0

    def watched(run: trainer.Trainer) -> dict[str, float]:
        nonlocal began
        if kill_at and run.step == kill_at and mode == "thread":
            # Within two steps and what lies between: evaluation, checkpoints, history.
            delay = rng.uniform(0, 2 * (time.monotonic() - began))
            threading.Timer(delay, die).start()
        began = time.monotonic()
        return step(run)

    def half(values: Any, file: Any) -> None:
        if kill_at and values["step"] > kill_at and mode == "file":
            whole = file.write
            left = rng.randrange(60_000)

            def write(data: Any) -> int:
                nonlocal left
                left -= len(data)
                if left < 0:
                    whole(data[: len(data) // 2])
                    file.flush()
                    die()
                return whole(data)

            file.write = write
        save(values, file)

    trainer.Trainer.train_step = watched  # type: ignore[method-assign]
    checkpoint.torch.save = half  # type: ignore[attr-defined]
    os.close(2)
    os.open(os.devnull, os.O_WRONLY)
    main(arguments, standalone_mode=False)


def launch(text: Path, out: Path, sets: list[str], *plan: Any) -> int | None:
    """Start or resume a run; its exit code, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = ["train", "--out", out, "--token-cache", out.parent / "cache", "--no-tensorboard"]
    if (out / "last.pt").exists():
        arguments.append("--resume")
    else:
        arguments += ["--preset", "tiny", "--data", text, "--valid", text]
        arguments += ["--config", out.parent / "c.toml", *(f"--set={item}" for item in sets)]
    child = context.Process(target=train, args=([str(a) for a in arguments], *plan))
    child.start()
    child.join()
    return child.exitcode


def history(out: Path) -> list[dict[str, Any]]:
    """Without the speeds."""
    lines = (out / "history.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in entries]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed(text: Path, tmp_path: Path, kills: int, dtype: str) -> None:
    (tmp_path / "c.toml").write_text(SETTINGS)
    rng = random.Random(f"{kills} {dtype}")
    steps = 5 * kills + 2
    sets = [f"dtype={dtype}", f"steps={steps}"]
    assert launch(text, tmp_path / "whole", sets, 0, "", 0) == 0
    out = tmp_path / "killed"
    for kill in range(kills):
        # Early ones fall before the first checkpoint.
        saved = load_checkpoint(out / "last.pt").step if (out / "last.pt").exists() else 0
        mode = "file" if kill % 3 == 2 else "thread"
        code = launch(text, out, sets, saved + rng.randrange(1, 4), mode, rng.randrange(1 << 30))
        assert code == -signal.SIGKILL
    assert launch(text, out, sets, 0, "", 0) == 0

    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(tmp_path / run / name) for run in ("whole", "killed"))
        assert (a.step, a.position, a.best_loss) == (b.step, b.position, b.best_loss)
        assert all(torch.equal(a.state[key], b.state[key]) for key in a.state)
        if name == "last.pt":
            assert a.step == steps
            assert a.optimizer is not None
            assert b.optimizer is not None
            for i, state in a.optimizer["state"].items():
                assert all(torch.equal(state[k], b.optimizer["state"][i][k]) for k in state)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == [
        "best.pt", "config.toml", "history.jsonl", "last.pt",
    ]  # fmt: skip
