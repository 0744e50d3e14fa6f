"""Gates fitted to a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitskip_export.pack import export_checkpoint
from bitskip_ref.exits import FixedExit, GateExit
from bitskip_ref.folder import read_folder
from bitskip_train import gates
from bitskip_train.checkpoint import load_checkpoint
from bitskip_train.data import Windows
from bitskip_train.loaded import load_exported
from bitskip_train.model import BitskipModel
from tests.train.conftest import small_config, small_split
from tests.train.test_cli import run, train_arguments


def test_closeness_by_hand() -> None:
    found = gates.closeness(torch.tensor([[0.0, 0.2], [0.1, 50.0]]), 0.2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.36788], [0.60653, 0.0]]))


def test_divergences_are_from_full_depth() -> None:
    torch.manual_seed(0)
    model = BitskipModel(small_config())
    hidden = model(torch.randint(97, (2, 5)), collect=range(1, 5))
    found = gates.divergences(model, {n: h.flatten(0, 1) for n, h in hidden.items()})
    assert found.shape == (4, 10)
    assert torch.equal(found[3], torch.zeros(10))
    p, q = (model.logits(hidden[n], n).flatten(0, 1).softmax(-1) for n in (4, 2))
    torch.testing.assert_close(found[1], (p * (p / q).log()).sum(-1), atol=1e-5, rtol=1e-3)


def test_logits_are_held_for_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = BitskipModel(small_config())
    hidden = {n: torch.randn(10, model.config.hidden_size) for n in range(1, 5)}
    whole, held = gates.divergences(model, hidden, [1, 3]), list[int]()
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x, n: held.append(len(x)) or logits(x, n))
    monkeypatch.setattr(gates, "LOGIT_BUDGET", 4 * model.config.vocab_size)
    torch.testing.assert_close(gates.divergences(model, hidden, [1, 3]), whole)
    assert held == [4, 4, 4, 4, 4, 4, 2, 2, 2]


def test_fitting_learns_where_to_stop_and_moves_nothing_else() -> None:
    torch.manual_seed(0)
    model = BitskipModel(small_config())
    with torch.no_grad():  # the last block doubts half of the vocabulary, the others change little
        model.block(3).down_proj.weight *= 100
    fitted = gates.with_gates(model.config, model.state_dict())
    before = {name: p.clone() for name, p in fitted.state_dict().items()}
    windows = Windows(small_split().tokens, 16, 0)
    losses: list[float] = []
    gates.fit_gates(
        fitted, windows, steps=80, batch=2, scale=1e-3, lr=3e-2,
        report=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 80
    assert losses[-1] < losses[0]
    hidden = fitted(torch.from_numpy(windows.batch(0, 4))[:, :-1], collect=range(1, 5))
    hidden = {n: h.detach().flatten(0, 1) for n, h in hidden.items()}
    target = gates.closeness(gates.divergences(fitted, hidden), 1e-3)
    for n in (1, 2, 3):
        assert fitted.gate(hidden[n], n).mean().item() == pytest.approx(
            target[n - 1].mean().item(), abs=0.1
        )
    for name, value in fitted.state_dict().items():
        if ".gate." not in name:
            assert torch.equal(value, before[name]), name


def test_from_a_checkpoint_to_a_folder_that_exits(text: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", ("--token-cache", tmp_path / "cache")
    assert run(*train_arguments(text, out, "steps=2")).exit_code == 0
    fit = ("fit-gates", out / "last.pt", "--data", text, "--steps", 3, "--batch", 2, "--scale", 1,
           *cache)  # fmt: skip
    result = run(*(str(a) for a in fit), "-o", tmp_path / "gated.pt")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1].startswith("step 3/3 | loss ")
    loaded = load_checkpoint(tmp_path / "gated.pt")
    assert loaded.config.gates
    assert loaded.optimizer is None
    engine = load_exported(export_checkpoint(tmp_path / "gated.pt", tmp_path / "model"))
    cache = engine.new_cache()
    engine.extend([1, 2, 3], cache, exit_layer=FixedExit().deepest(engine.config))
    assert engine.step(4, cache, GateExit(0.0))[1] == 1
    assert engine.step(4, cache, GateExit(1.0))[1] == 4


def test_gates_of_a_folder(text: Path, tmp_path: Path) -> None:
    """The same model but for the gates named, with the divergences of its exact engine."""
    out, cache = tmp_path / "run", ("--token-cache", tmp_path / "cache")
    assert run(*train_arguments(text, out, "steps=2")).exit_code == 0
    plain = export_checkpoint(out / "last.pt", tmp_path / "plain")
    fit = ("fit-gates", plain, "--data", text, "--steps", 2, "--batch", 2, "--layers", "1,3",
           *cache, "-o", tmp_path / "gated")  # fmt: skip
    result = run(*(str(a) for a in fit))
    assert result.exit_code == 0, result.output
    before, after = read_folder(plain), read_folder(tmp_path / "gated")
    assert after.config == before.config.replace(gates=True)
    assert after.end_ids == before.end_ids
    for name, values in before.tensors.items():
        assert np.array_equal(values, after.tensors[name]), name
    fitted = [bool(after.tensors[f"layers.{i}.gate.fc2.weight"].any()) for i in range(4)]
    assert fitted == [True, False, True, False]
    ids = [1, 2, 3, 4, 5]
    exact = load_exported(tmp_path / "gated")
    model = gates.of_folder(after.config, after.tensors)
    states = model(torch.tensor([ids]), collect=(2, 4))
    found = gates.divergences(model, {n: x[0] for n, x in states.items()}, [2])
    z, full = (torch.from_numpy(exact.logits(ids, n)).log_softmax(-1) for n in (2, 4))
    expected = torch.nn.functional.kl_div(z, full, reduction="none", log_target=True).sum(-1)
    assert found.shape == (1, 5)
    assert torch.allclose(found[0], expected, rtol=0.05, atol=1e-4)
    refused = run(*(str(a) for a in (*fit[:-1], tmp_path / "no", "--layers", "4")))
    assert refused.exit_code != 0 and "choose from 1..3" in refused.output


def test_gates_that_are_not_fitted_never_stop_and_are_always_the_same() -> None:
    torch.manual_seed(0)
    model = BitskipModel(small_config())
    found = [gates.with_gates(model.config, model.state_dict()) for _ in range(2)]
    for gated in found:
        gates.fit_gates(
            gated, Windows(small_split().tokens, 16, 0), steps=1, batch=1, scale=0.1, layers=[2]
        )
    states = [gated.state_dict() for gated in found]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    hidden = torch.randn(3, 5, model.config.hidden_size)
    assert all((found[0].gate(hidden, n) == 0.5).all() for n in (1, 3, 4))
