"""Learning rates and layer-dropout probabilities against hand values."""

from __future__ import annotations

import pytest

from bitskip_train.schedule import dropout_probabilities, learning_rate
from bitskip_train.settings import TrainConfig


def rates(**changes: float | str) -> list[float]:
    train = TrainConfig(lr=1.0, steps=10, **changes)
    return [learning_rate(train, step) for step in range(10)]


def test_linear() -> None:
    want = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(warmup=2, schedule="linear") == pytest.approx(want)


def test_linear_falls_to_the_smallest_rate() -> None:
    train = TrainConfig(lr=1.0, min_lr=0.2, steps=10, warmup=0)
    assert learning_rate(train, 5) == pytest.approx(0.6)
    assert learning_rate(train, 10) == pytest.approx(0.2)
    assert learning_rate(train, 99) == pytest.approx(0.2)


def test_wsd_stays_then_falls() -> None:
    want = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(warmup=2, schedule="wsd", decay=0.4) == pytest.approx(want)


def test_cosine() -> None:
    train = TrainConfig(lr=1.0, steps=10, warmup=2, schedule="cosine")
    assert learning_rate(train, 2) == pytest.approx(1.0)
    assert learning_rate(train, 6) == pytest.approx(0.5)
    assert learning_rate(train, 4) == pytest.approx((1 + 0.5**0.5) / 2)


def test_dropout_of_v1_sums_to_one_before_the_last_is_cleared() -> None:
    for largest in (0.5, 0.1):  # it cancels
        p = dropout_probabilities(TrainConfig(dropout_max=largest, dropout_form="v1"), 4)
        assert p == pytest.approx([1 / 30, 4 / 30, 9 / 30, 0.0])


def test_dropout_of_v2() -> None:
    p = dropout_probabilities(TrainConfig(dropout_max=0.7, dropout_form="v2"), 4)
    assert p == pytest.approx([0.0, 0.7 / 16, 0.7 * 4 / 16, 0.0])


def test_dropout_ramp_and_off() -> None:
    train = TrainConfig(dropout_max=0.7, dropout_form="v2", dropout_ramp=10)
    full = dropout_probabilities(train, 4)
    assert dropout_probabilities(train, 4, step=5) == pytest.approx([x / 2 for x in full])
    assert dropout_probabilities(train, 4, step=50) == full
    ending = TrainConfig(dropout_max=0.7, dropout_form="v2", dropout_until=20)
    assert dropout_probabilities(ending, 4, step=19) == full
    assert dropout_probabilities(ending, 4, step=20) == [0.0] * 4
    assert dropout_probabilities(TrainConfig(), 4) == [0.0] * 4
