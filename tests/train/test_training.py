"""The training step and loop: gradients, groups, resuming, learning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitskip_ref.config import ConfigError
from bitskip_train import losses, objective, trainer
from bitskip_train.checkpoint import load_checkpoint
from bitskip_train.data import Split
from bitskip_train.draws import Draws
from bitskip_train.errors import CheckpointError, TrainingError
from bitskip_train.layers import peak
from bitskip_train.soft_targets import likeliest, write_soft_targets
from bitskip_train.trainer import Trainer, make_optimizer
from tests.train.conftest import small_config, small_split, small_train, small_trainer

EVERYTHING: dict[str, Any] = {
    "exit_weights": "inverse", "exit_last": 0, "exit_distill": 0.5, "route_lambda": 0.2,
    "quant_lambda": 0.05, "peak_lambda": 0.01, "peak_blocks": 2, "peak_rest": 0.5,
}  # fmt: skip


def plain_loss(run: Trainer, ids: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The loss of one pass written as one expression, for autograd to take apart."""
    model, train, depth = run.model, run.train, run.config.num_hidden_layers
    peaks: list[list[torch.Tensor]] = []
    hidden = model(ids[:, :-1], keep=keep, collect=range(1, depth + 1), peaks=peaks)
    targets = ids[:, 1:].flatten()

    def mean_loss(n: int) -> torch.Tensor:
        return losses.cross_entropy(model.logits(hidden[n], n).flatten(0, 1), targets) / len(
            targets
        )

    total = mean_loss(depth)
    teacher = model.logits(hidden[depth], depth).flatten(0, 1)
    for n, weight in run.objective.exits.items():
        kl = losses.distillation(model.logits(hidden[n], n).flatten(0, 1), teacher) / len(targets)
        total = total + train.exit_lambda * weight * (mean_loss(n) + train.exit_distill * kl)
    if train.route_lambda:
        draws = Draws(0, 0, len(ids))
        if keep is not None:
            draws.uniform(depth)
        tokens = ids.shape[1] - 1
        gates = [
            losses.sample_exits(model.gate(hidden[n], n), draws.uniform(tokens))
            for n in range(1, depth + 1)
        ]
        mean_layer = losses.mean_exit_layer(gates, train.route_leftover)
        total = total + train.route_lambda * losses.route_loss(mean_layer, depth)
    if train.peak_lambda:
        run_for = [1] * depth if keep is None else keep.any(1).tolist()
        assert [len(block) for block in peaks] == [4 * bool(runs) for runs in run_for]
        first, rest = peaks[: train.peak_blocks], [*peaks[train.peak_blocks :]]
        rest.append([peak(model.exit_norm(depth)(hidden[depth], model.ops()))])
        for weight, blocks in ((1.0, first), (train.peak_rest, rest)):
            if found := [value for block in blocks for value in block]:
                total = total + train.peak_lambda * weight * sum(found) / len(found)
    return total


@pytest.mark.parametrize("budget", [1 << 25, 97 * 5])
def test_gradients_are_those_of_the_whole_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(objective, "LOGIT_BUDGET", budget)  # the second: pieces of 5 rows
    config = small_config("wt2-bitskip")
    run = small_trainer(
        tmp_path,
        config,
        **(EVERYTHING | {"accumulation": 1, "exit_subset": 0, "quant_lambda": 0.0}),
    )
    ids = torch.from_numpy(run.windows.batch(0, 3))
    run.objective.backward(ids, 0, Draws(0, 0, 3))
    found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()
    keep = run.objective.keep(0, Draws(0, 0, 3))
    plain_loss(run, ids, keep).backward()
    for name, p in run.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_unshifted_exit_targets_are_the_inputs(tmp_path: Path) -> None:
    results = []
    for reading in ("next", "same"):
        run = small_trainer(
            tmp_path, exit_targets=reading, exit_layers=[3], exit_subset=0, dropout_max=0.0
        )
        ids = torch.from_numpy(run.windows.batch(0, 3))
        terms = run.objective.backward(ids, 0, Draws(0, 0, 3))
        results.append(terms["exit_loss"].item())
        with torch.no_grad():
            logits = run.model.logits(run.model(ids[:, :-1], exit_layer=3)[3], 3)
        targets = ids[:, 1:] if reading == "next" else ids[:, :-1]
        want = losses.cross_entropy(logits.flatten(0, 1), targets.flatten()) / targets.numel()
        assert results[-1] == pytest.approx(want.item(), rel=1e-5)
    assert results[0] != results[1]


def test_the_reported_exit_loss_is_the_weighted_mean_of_the_exits_used(tmp_path: Path) -> None:
    run = small_trainer(tmp_path, dropout_max=0.0)
    ids = torch.from_numpy(run.windows.batch(0, 3))
    weights = losses.exit_subset(run.objective.exits, 2, 1)
    assert list(weights) == [2, 3]
    terms = run.objective.backward(ids, 1, Draws(0, 0, 3))
    want = 0.0
    for n, weight in weights.items():
        with torch.no_grad():
            logits = run.model.logits(run.model(ids[:, :-1], exit_layer=n)[n], n)
        loss = losses.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item() / 24
        want += weight * loss / sum(weights.values())
    assert terms["exit_loss"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("own", ["shared", "per_layer"])
def test_detached_exits_leave_what_they_share_alone(tmp_path: Path, own: str) -> None:
    """The blocks and an exit's own norm and head get the whole gradient, the shared ones none."""
    config = small_config(exit_norm=own, exit_head=own)
    gradients = []
    for changes in ({"exit_lambda": 0.0}, {}, {"exit_detach": True}):
        run = small_trainer(tmp_path, config, dropout_max=0.0, exit_subset=0, **changes)
        ids = torch.from_numpy(run.windows.batch(0, 3))
        run.objective.backward(ids, 0, Draws(0, 0, 3))
        gradients.append({name: p.grad for name, p in run.model.named_parameters()})
    without, attached, detached = gradients
    for name, found in detached.items():
        shared = name.startswith(("final_norm", "lm_head"))
        torch.testing.assert_close(found, without[name] if shared else attached[name], msg=name)
    reaches = not torch.equal(attached["lm_head.weight"], without["lm_head.weight"])
    assert reaches == (own == "shared")
    assert not torch.equal(attached["layers.0.q_proj.weight"], without["layers.0.q_proj.weight"])


def test_the_exit_loss_is_phased_in(tmp_path: Path) -> None:
    def gradient(step: int, **changes: Any) -> torch.Tensor:
        run = small_trainer(tmp_path, dropout_max=0.0, exit_subset=0, **changes)
        ids = torch.from_numpy(run.windows.batch(0, 3))
        run.objective.backward(ids, step, Draws(0, 0, 3))
        return run.model.lm_head.weight.grad

    for step, part in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        want = gradient(0, exit_lambda=0.3 * part)
        torch.testing.assert_close(gradient(step, exit_ramp=10), want)


def test_blocks_are_skipped_with_their_probabilities(tmp_path: Path) -> None:
    run = small_trainer(tmp_path, dropout_max=0.9)  # v2: 0, 0.9 / 16, 0.9 * 4 / 16, last 0
    keep = run.objective.keep(0, Draws(0, 0, 4000))
    assert keep.shape == (4, 4000)
    skipped = 1 - keep.float().mean(1)
    assert skipped.tolist() == pytest.approx([0, 0.05625, 0.225, 0], abs=0.02)
    assert keep[0].all()
    assert keep[3].all()
    run = small_trainer(tmp_path, dropout_max=0.0)
    assert run.objective.keep(0, Draws(0, 0, 3)) is None


def test_weight_decay_is_on_matrices_only() -> None:
    model = trainer.BitskipModel(small_config("wt2-bitskip"))
    decayed, others = make_optimizer(model, small_train(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["bitskip-v2", "wt2-bitskip", "layerskip"])
def test_resuming_repeats_the_bits(tmp_path: Path, name: str) -> None:
    config = small_config(name)
    options = EVERYTHING if config.gates else {}
    if config.activation_bits == 4:
        tokens = small_split().tokens
        z = np.random.default_rng(1).normal(0, 3, (len(tokens), 97)).astype(np.float32)
        write_soft_targets(tmp_path / "soft", tokens, 4, likeliest(z, 4))
        options = {"soft_targets": str(tmp_path / "soft"), "soft_share": 0.7, "exit_ramp": 4,
                   "dropout_ramp": 4}  # fmt: skip
    whole = small_trainer(tmp_path / "whole", config, **options)
    assert whole.run(tensorboard=False)
    half = small_trainer(tmp_path / "half", config, **options)
    for _ in range(3):
        half.train_step()
    half._save("last.pt")
    loaded = load_checkpoint(tmp_path / "half" / "last.pt")
    train = small_train(**options)
    resumed = Trainer(config, train, small_split(), None, "{}", tmp_path / "half", loaded)
    assert resumed.run(tensorboard=False)
    a, b = (load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "half"))
    assert (a.step, a.position) == (b.step, b.position) == (6, 36)
    assert all(torch.equal(a.state[key], b.state[key]) for key in a.state)
    for i, state in a.optimizer["state"].items():
        assert all(torch.equal(state[key], b.optimizer["state"][i][key]) for key in state)


def test_the_seed_chooses_weights_order_and_dropout(tmp_path: Path) -> None:
    def trained(first: int = 5, order: int = 5, draws: int = 5) -> torch.Tensor:
        run = small_trainer(tmp_path, seed=first)
        run.windows.seed, run.train = order, run.train.replace(seed=draws)
        run.train_step()
        run.train_step()
        return run.model.lm_head.weight.detach().clone()

    reference = trained()
    assert torch.equal(trained(), reference)
    for other in (trained(first=6), trained(order=6), trained(draws=6)):
        assert not torch.equal(other, reference)


def test_training_lowers_the_loss_and_the_checkpoint_has_the_trained_weights(
    tmp_path: Path,
) -> None:
    run = small_trainer(tmp_path, steps=40, eval_every=20, valid=True, lr=3e-2)
    assert run.run(tensorboard=False)
    found = [e["valid_loss"] for e in run.history if "valid_loss" in e]
    assert len(found) == 2
    first = next(e["loss"] for e in run.history if "loss" in e)
    assert found[-1] < first - 0.3
    # A fresh model quantizes the stored weights anew: a stale cache would show here.
    best = load_checkpoint(tmp_path / "best.pt")
    assert best.optimizer is None
    assert best.best_loss == min(found)
    fresh = small_trainer(tmp_path, valid=True)
    fresh.model.load_state_dict(best.state)
    split = small_split()
    result = trainer.evaluate(fresh.model, split.tokens, split.bytes, context=8, exits=[4])
    assert result[4].loss == pytest.approx(min(found), rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == run.history


def test_patience_stops_early(tmp_path: Path) -> None:
    run = small_trainer(tmp_path, steps=50, eval_every=1, patience=2, valid=True, lr=1e-12)
    run.best_loss = 0.0
    run.history.append({"step": 0, "valid_loss": 0.0})
    assert run.run(tensorboard=False)
    assert run.step == 2


def test_other_validation_text_begins_the_best_anew(tmp_path: Path) -> None:
    run = small_trainer(tmp_path, steps=2, eval_every=1, valid=True)
    run.run(tensorboard=False)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded.best_loss is not None
    loaded.best_loss = 0.5
    loaded.history.append({"step": 2, "valid_loss": 0.5})

    def resumed(valid: Split, **changes: Any) -> Trainer:
        train = small_train(steps=4, eval_every=1, patience=1, **changes)
        return Trainer(small_config(), train, small_split(), valid, "{}", tmp_path, loaded)

    assert resumed(small_split()).best_loss == 0.5
    other = resumed(small_split(count=300))
    assert other.best_loss is None and not other._patience_is_over()
    other.run(tensorboard=False)
    best = load_checkpoint(tmp_path / "best.pt")
    assert best.step >= 3 and best.best_loss == other.best_loss > 0.5
    assert resumed(small_split(), eval_tokens=100).best_loss is None
    with pytest.raises(ConfigError, match="steps = 1: 2 of the run are done"):
        Trainer(small_config(), small_train(steps=1), small_split(), None, "{}", tmp_path, loaded)


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tmp_path: Path) -> None:
    run = small_trainer(tmp_path)
    with torch.no_grad():
        run.model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: .* smaller train\.lr"):
        run.run(tensorboard=False)
    assert not (tmp_path / "last.pt").exists()


def test_failing_compilation_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = type("NoCompiler", (Exception,), {"__module__": "torch._inductor.exc"})

    def fail(run: Trainer) -> None:
        raise failure("no compiler\nand a long story")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(TrainingError, match=r"^train.compile: no compiler \(.*compile=false\)$"):
        small_trainer(tmp_path, compile=True).run(tensorboard=False)
    with pytest.raises(failure):  # without compilation it is a defect: no disguise
        small_trainer(tmp_path).run(tensorboard=False)


def test_tensorboard_is_optional_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    assert small_trainer(tmp_path, steps=1).run()
    assert "tensorboard is not installed" in capsys.readouterr().err
    with pytest.raises(ImportError):  # the program says how to install it
        small_trainer(tmp_path, steps=1).run(tensorboard=True)


def test_bfloat16_trains_float32_weights(tmp_path: Path) -> None:
    run = small_trainer(tmp_path, dtype="bfloat16")
    run.train_step()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bitskip-v1", {"route_lambda": 0.1}, r"needs model\.gates"),
        ("layerskip", {"quant_lambda": 0.1}, "needs model.linear"),
        ("layerskip", {"peak_lambda": 0.1}, "inputs are quantized"),
        ("bitskip-v1", {"peak_lambda": 0.1, "peak_rest": 0.1}, "needs peak_blocks"),
        ("bitskip-v1", {"context": 65}, "the model holds 64 positions"),
        ("bitskip-v1", {"eval_exits": [5]}, r"within 1\.\.4"),
        ("bitskip-v1", {"device": "gpu7"}, "must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_settings_that_contradict_each_other(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_trainer(tmp_path, small_config(name), **changes)


def test_best_pt_cannot_be_resumed(tmp_path: Path) -> None:
    run = small_trainer(tmp_path)
    run._save("best.pt", optimizer=False)
    loaded = load_checkpoint(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="no optimizer state"):
        Trainer(run.config, run.train, small_split(), None, "{}", tmp_path, loaded)
