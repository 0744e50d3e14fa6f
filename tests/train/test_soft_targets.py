"""Soft targets: their file, their part of the loss, and a student that learns from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitskip_ref.config import ConfigError
from bitskip_train import losses
from bitskip_train.checkpoint import Checkpoint, load_checkpoint
from bitskip_train.errors import CheckpointError, DataError
from bitskip_train.settings import check_settings
from bitskip_train.soft_targets import (
    UNIT,
    Soft,
    likeliest,
    read_soft_targets,
    write_soft_targets,
)
from bitskip_train.trainer import Trainer
from tests.train.conftest import small_config, small_split, small_train, small_trainer


def made(count: int = 400, top: int = 4, vocabulary: int = 97) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities of a teacher that was never asked."""
    z = np.random.default_rng(1).normal(0, 3, (count, vocabulary)).astype(np.float32)
    return likeliest(z, top)


def written(path: Path, tokens: np.ndarray) -> Path:
    """A file of the above for these tokens."""
    write_soft_targets(path, tokens, 4, made(len(tokens)))
    return path


def test_the_likeliest_and_their_probabilities() -> None:
    z = np.random.default_rng(0).normal(0, 3, (50, 97)).astype(np.float32)
    ids, units = likeliest(z, 5)
    p = np.exp(z.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    for row, of, said in zip(ids, p, units, strict=True):
        assert set(row.tolist()) == set(np.argsort(-of)[:5].tolist())
        assert said / UNIT == pytest.approx(of[row], abs=3e-5)
    assert units.sum(1, dtype=np.int64).max() <= UNIT
    all_ids, all_units = likeliest(z, 200)
    assert all_ids.shape == (50, 97) and (all_units.sum(1, dtype=np.int64) <= UNIT).all()
    sure, one = likeliest(np.array([[0.0, 200.0, 0.0]], np.float32), 2)
    assert 1 in sure and int(one.max()) == UNIT - 1


def test_the_loss_is_the_cross_entropy_of_the_mixed_target() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 97, generator=generator, requires_grad=True)
    targets = torch.randint(97, (7,), generator=generator)
    ids, units = made(7)
    soft = Soft(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(units.astype(np.float32) / UNIT * 0.7),
    )
    whole = torch.zeros(7, 97).scatter_add_(1, soft.ids, soft.probabilities)
    whole[torch.arange(7), targets] += 1 - soft.probabilities.sum(1)
    assert whole.sum(1) == pytest.approx(torch.ones(7), abs=1e-6)
    want = -(whole * F.log_softmax(logits, -1)).sum()
    (gradient,) = torch.autograd.grad(want, logits)
    found = losses.cross_entropy(logits, targets, soft)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    assert torch.allclose(logits.grad, gradient, atol=1e-6)
    plain = losses.cross_entropy(logits, targets)
    assert abs(float(plain.detach()) - float(want.detach())) > 0.1


def test_a_file_is_of_its_tokens_alone(tmp_path: Path) -> None:
    tokens = small_split().tokens
    path = written(tmp_path / "soft", tokens)
    found = read_soft_targets(path, tokens, 97)
    ids, units = made()
    assert np.array_equal(found.ids, ids) and np.array_equal(found.probabilities, units)
    rows = found.rows([3, 390], 5, 0.5)
    at = [3, 4, 5, 6, 7, 390, 391, 392, 393, 394]
    assert np.array_equal(rows.ids.numpy(), ids[at])
    assert rows.probabilities.numpy() == pytest.approx(units[at] / UNIT / 2)
    assert read_soft_targets(path, tokens.astype(np.uint32), 97).ids.shape == (400, 4)
    other = tokens.copy()
    other[7] += 1
    for wrong in (other, tokens[:-1]):
        with pytest.raises(DataError, match="of other tokens than this run's"):
            read_soft_targets(path, wrong, 97)
    with pytest.raises(DataError, match="an id that the model lacks"):
        read_soft_targets(path, tokens, 50)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    tokens = small_split().tokens
    raw = written(tmp_path / "soft", tokens).read_bytes()
    for name, damage in {
        "shorter": raw[:-2], "nothing": b"", "no file of this kind": b"x" * 4000,
        "above 1": raw[:-3200] + b"\xff" * 3200,
    }.items():  # fmt: skip
        (tmp_path / "damaged").write_bytes(damage)
        with pytest.raises(DataError, match=r"soft targets .*damaged"):
            read_soft_targets(tmp_path / "damaged", tokens, 97)
        assert name
    with pytest.raises(DataError, match="no such file"):
        read_soft_targets(tmp_path / "nowhere", tokens, 97)
    with pytest.raises(DataError, match="not such a file"):
        read_soft_targets(tmp_path, tokens, 97)


def test_a_teacher_may_come_or_go_but_not_become_another(tmp_path: Path) -> None:
    tokens = small_split().tokens
    path = tmp_path / "soft"
    write_soft_targets(path, tokens, 4, made(len(tokens)))

    def saved(soft: str, resume: Checkpoint | None = None, **how: bool) -> Checkpoint:
        train, split = small_train(soft_targets=soft), small_split()
        trainer = Trainer(small_config(), train, split, None, "{}", tmp_path, resume, **how)
        trainer._save("last.pt")
        return load_checkpoint(tmp_path / "last.pt")

    taught = saved(str(path), saved(""))
    saved("", taught)
    saved(str(path), taught)
    ids, units = made(len(tokens))
    units[-1, 0] -= 1
    write_soft_targets(path, tokens, 4, (ids, units))
    with pytest.raises(CheckpointError, match=r"other soft targets.*--accept-changes"):
        saved(str(path), taught)
    saved(str(path), taught, accept_changes=True)


def test_a_student_learns_what_the_teacher_says_and_not_the_text(tmp_path: Path) -> None:
    """A teacher sure that 11 follows everything; rows are those of the tokens that are named."""
    tokens = small_split().tokens
    z = np.zeros((len(tokens), 97), np.float32)
    z[np.arange(len(tokens)), (tokens + 1) % 97] = 30  # of token t it says t + 1
    write_soft_targets(tmp_path / "soft", tokens, 2, likeliest(z, 2))
    losses_of = {}
    for name, soft in (("taught", str(tmp_path / "soft")), ("alone", "")):
        trainer = small_trainer(
            tmp_path / name, soft_targets=soft, steps=60, dropout_max=0.0, exit_layers=[2],
            exit_subset=0,
        )  # fmt: skip
        for _ in range(60):
            values = trainer.train_step()
        losses_of[name] = values["loss"]
        ids = torch.from_numpy(trainer.windows.batch(0, 8))
        with torch.no_grad():
            hidden = trainer.model(ids[:, :-1], collect={2, 4})
            for n in (2, 4):
                said = trainer.model.logits(hidden[n], n).argmax(-1)
                right = float((said == (ids[:, 1:] + 1) % 97).float().mean())
                text = float((said == ids[:, 1:]).float().mean())
                # Every second token repeats the one before it: half of them can be named.
                assert (right, text)[name == "alone"] > 0.35
                assert (right, text)[name == "taught"] < 0.2
    assert small_train(soft_targets="x").soft_share == 1.0


@pytest.mark.parametrize(
    "changes", [{"targets": "same"}, {"exit_targets": "same"}, {"pad_documents": True}]
)
def test_readings_that_no_teacher_can_follow(changes: dict) -> None:
    with pytest.raises(ConfigError, match="soft_targets: a teacher names the next token"):
        check_settings(small_config(), small_train(soft_targets="x", **changes))


def test_a_vocabulary_that_the_file_cannot_name() -> None:
    with pytest.raises(ConfigError, match="at most 65,536 tokens"):
        check_settings(small_config(vocab_size=70_000), small_train(soft_targets="x"))
