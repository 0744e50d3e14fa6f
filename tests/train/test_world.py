"""Training in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitskip_train.checkpoint import Checkpoint, load_checkpoint
from bitskip_train.draws import Draws
from bitskip_train.schedule import dropout_probabilities
from bitskip_train.settings import TrainConfig

# Six layers, so that the fifth is skipped by nearly half of the samples.
SETTINGS = """
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 6
gates = true
exit_norm = "per_layer"
[train]
threads = 1
tokenizer = "bpe:300"
context = 8
warmup = 2
dropout_max = 1.0
dropout_form = "v2"
exit_subset = 2
exit_distill = 0.5
quant_lambda = 0.05
log_every = 1
eval_every = 2
eval_tokens = 60
eval_exits = [2]
patience = 100
save_every = 1000
"""


def trained(
    text: Path, out: Path, sets: dict[str, object], processes: int
) -> tuple[Checkpoint, list[float]]:
    """The last checkpoint and each step's loss of a run in one or several processes."""
    (out.parent / "c.toml").write_text(SETTINGS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [
        "cli.py", "train", "--preset", "tiny", "--data", text, "--valid", text, "--out", out,
        "--config", out.parent / "c.toml", "--token-cache", out.parent / "cache",
        "--no-tensorboard", *(f"--set={key}={value}" for key, value in sets.items()),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(out / "last.pt")
    return checkpoint, [entry["loss"] for entry in checkpoint.history if "loss" in entry]


@pytest.mark.parametrize(
    ("steps", "route_lambda"),
    [
        (6, 0.0),  # gates without gradient, beside blocks that a process skips
        pytest.param(50, 0.2, marks=pytest.mark.slow),
        pytest.param(50, 0.0, marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one_that_accumulates_twice(
    text: Path, tmp_path: Path, steps: int, route_lambda: float
) -> None:
    """To the bit: samples draw, exits rotate and gradients add up the same way."""
    sets = {"steps": steps, "route_lambda": route_lambda, "batch": 1}
    one, losses = trained(text, tmp_path / "one", {**sets, "accumulation": 2}, 1)
    two, same = trained(text, tmp_path / "two", {**sets, "accumulation": 1}, 2)
    assert len(losses) == steps
    assert losses == same
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)
    assert (one.step, one.position, one.best_loss) == (two.step, two.position, two.best_loss)
    valid = [[e for e in c.history if "valid_loss" in e] for c in (one, two)]
    assert valid[0] == valid[1]


def test_in_that_run_a_process_skips_a_block_that_the_other_runs() -> None:
    chances = dropout_probabilities(TrainConfig(dropout_max=1.0, dropout_form="v2"), 6)
    kept = Draws(0, 0, 12).uniform(6) >= torch.tensor(chances)
    assert (kept[0::2] != kept[1::2]).any(1).sum() >= 2


@pytest.mark.slow
def test_two_processes_step_like_one_with_twice_the_batch(text: Path, tmp_path: Path) -> None:
    """Up to rounding, which moves codes after some steps."""
    sets = {"steps": 5, "weight_decay": 0}
    one, losses = trained(text, tmp_path / "one", {**sets, "batch": 4}, 1)
    two, same = trained(text, tmp_path / "two", {**sets, "batch": 2}, 2)
    assert losses == pytest.approx(same, abs=1e-5)
    assert (one.step, one.position) == (two.step, two.position) == (5, 20)


def test_a_sample_draws_the_same_in_every_batch() -> None:
    whole, late = Draws(3, 0, 6), Draws(3, 4, 2)
    for shape in ((5,), (2, 3)):
        assert torch.equal(whole.uniform(*shape)[4:], late.uniform(*shape))
    assert not torch.equal(Draws(3, 0, 1).uniform(4), Draws(4, 0, 1).uniform(4))
    assert len(Draws(3, 0, 50).uniform().unique()) == 50
