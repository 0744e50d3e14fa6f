"""Training in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitskip_train.checkpoint import load_checkpoint

SETTINGS = """
[model]
hidden_size = 16
intermediate_size = 24
[train]
threads = 1
tokenizer = "bpe:300"
context = 8
steps = 4
warmup = 1
dropout_max = 0
exit_subset = 1
weight_decay = 0
eval_every = 2
patience = 2
"""


@pytest.mark.slow
def test_two_processes_step_like_one_with_twice_the_batch(text: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(SETTINGS)
    for name, batch, launcher in (
        ("one", 2, []),
        ("two", 1, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        done = subprocess.run(
            [sys.executable, *launcher, "cli.py", "train", "--preset", "tiny", "--data", text,
             "--valid", text, "--config", tmp_path / "c.toml", "--set", f"batch={batch}",
             "--out", tmp_path / name, "--token-cache", tmp_path / "cache", "--no-tensorboard"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert (one.step, one.position) == (two.step, two.position) == (4, 8)
    for name in one.state:
        torch.testing.assert_close(one.state[name], two.state[name], rtol=1e-3, atol=1e-4)
    assert [e["step"] for e in one.history] == [e["step"] for e in two.history]
