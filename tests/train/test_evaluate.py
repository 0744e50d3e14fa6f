"""Held-out loss: every token once, weighted by tokens."""

from __future__ import annotations

import math

import pytest
import torch

from bitskip_ref.config import ConfigError
from bitskip_train import evaluate as module
from bitskip_train.evaluate import evaluate
from bitskip_train.losses import cross_entropy
from bitskip_train.model import BitskipModel
from tests.train.conftest import small_config, small_split


def small_model() -> BitskipModel:
    torch.manual_seed(0)
    return BitskipModel(small_config())


@pytest.mark.parametrize("budget", [1 << 25, 97 * 3])
def test_the_loss_is_the_mean_over_all_tokens_but_the_first(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(module, "LOGIT_BUDGET", budget)
    model, tokens = small_model(), small_split().tokens[:47]  # windows of 10, the last of 6
    results = evaluate(model, tokens, 200, context=10, exits=[3, 1], batch=3)
    assert list(results) == [1, 3]
    ids = torch.from_numpy(tokens.astype("int64"))
    for exit_layer, result in results.items():
        total = 0.0
        for start in range(0, 46, 10):
            window = ids[start : start + 11]
            with torch.no_grad():
                hidden = model(window[None, :-1], exit_layer=exit_layer)
                logits = model.logits(hidden[exit_layer], exit_layer)[0]
            total += cross_entropy(logits, window[1:]).item()
        assert result.tokens == 46
        assert result.loss == pytest.approx(total / 46, rel=1e-5)
        assert result.ppl == pytest.approx(math.exp(result.loss))
        assert result.bits_per_byte == pytest.approx(total / math.log(2) / 200, rel=1e-5)


def test_windows_cover_every_token_once() -> None:
    for count in (2, 3, 10, 11, 12, 37):
        groups = module._window_groups(count, 10, 2)
        covered = [t for group in groups for a, b in group for t in range(a + 1, b + 1)]
        assert covered == list(range(1, count))
        assert all(len({b - a for a, b in group}) == 1 for group in groups)


def test_bypasses_differ_and_the_mode_is_kept() -> None:
    model, tokens = small_model(), small_split().tokens
    losses = [
        evaluate(model, tokens, 1, context=16, exits=[4], bypass=bypass)[4].loss
        for bypass in ("none", "weights", "activations")
    ]
    assert len(set(losses)) == 3
    assert model.training


def test_wrong_arguments() -> None:
    model, tokens = small_model(), small_split().tokens
    with pytest.raises(ConfigError, match=r"exit layer 5: must be within 1\.\.4"):
        evaluate(model, tokens, 1, context=8, exits=[5])
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(model, tokens[:1], 1, context=8, exits=[4])
