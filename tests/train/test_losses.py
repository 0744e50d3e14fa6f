"""Terms of the loss against hand values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bitskip_ref.config import ConfigError
from bitskip_train import losses
from bitskip_train.layers import peak
from bitskip_train.settings import TrainConfig


def test_exit_weights_of_v1() -> None:
    weights = losses.exit_weights(TrainConfig(exit_weights="linear"), 4)
    assert weights == pytest.approx({1: 2 / 9, 2: 3 / 9, 3: 4 / 9})


def test_exit_weights_of_v2() -> None:
    weights = losses.exit_weights(TrainConfig(exit_weights="inverse", exit_last=0), 4)
    assert weights == pytest.approx({1: 12 / 25, 2: 6 / 25, 3: 4 / 25, 4: 3 / 25})


def test_other_exit_weights_and_choices() -> None:
    uniform = TrainConfig(exit_weights="uniform", exit_layers=(4, 2))
    assert losses.exit_weights(uniform, 4) == {2: 0.5, 4: 0.5}
    shares = TrainConfig(exit_layers=(4, 2), exit_shares=(1, 3))
    assert losses.exit_weights(shares, 4) == {2: 0.75, 4: 0.25}
    triangular = TrainConfig(exit_weights="triangular", exit_first=2, exit_last=3)
    assert losses.exit_weights(triangular, 4) == pytest.approx({2: 3 / 9, 3: 6 / 9})


@pytest.mark.parametrize(
    "changes", [{"exit_layers": (5,)}, {"exit_last": 5}, {"exit_first": 3, "exit_last": 2}]
)
def test_exits_out_of_range_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match=r"within 1\.\.4"):
        losses.exit_weights(TrainConfig(**changes), 4)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 22])
def test_subsets_add_up_to_the_full_loss(count: int) -> None:
    weights = losses.exit_weights(TrainConfig(), 24)
    total = dict.fromkeys(weights, 0.0)
    for turn in range(100, 123):  # one round, begun anywhere
        subset = losses.exit_subset(weights, count, turn)
        assert len(subset) == count
        for n, weight in subset.items():
            total[n] += weight
    assert {n: t / 23 for n, t in total.items()} == pytest.approx(weights)


def test_subsets_are_spread_over_the_depth() -> None:
    weights = losses.exit_weights(TrainConfig(), 24)
    for turn in range(23):
        subset = losses.exit_subset(weights, 4, turn)
        assert min(subset) <= 6
        assert max(subset) >= 18
        assert 0.6 < sum(subset.values()) < 1.4


def test_subset_of_none_or_more_is_all() -> None:
    weights = {1: 0.25, 2: 0.75}
    assert losses.exit_subset(weights, 0, 3) == losses.exit_subset(weights, 5, 3) == weights


def test_cross_entropy_and_distillation() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert losses.cross_entropy(logits, torch.tensor([1, 0])).item() == pytest.approx(
        math.log(4 / 3) + math.log(2)
    )
    teacher = logits.clone().requires_grad_()
    student = torch.zeros(2, 2, requires_grad=True)
    loss = losses.distillation(student, teacher)
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_pieces_is_the_library_s(dtype: torch.dtype) -> None:
    rows, vocabulary = 7, losses.PIECE // 3  # three rows in a piece
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=draw).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    found = []
    for loss in (losses.cross_entropy, lambda z, t: F.cross_entropy(z.float(), t, reduction="sum")):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, targets)
        (0.25 * value).backward()
        found.append((value.detach(), leaf.grad))
    (value, gradient), (want, wanted) = found
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(
        gradient, wanted, atol=1e-9, rtol=1e-5 if dtype.itemsize == 4 else 2**-7
    )
    assert losses.cross_entropy(logits, targets) == value  # and without a gradient


def test_route_loss_by_hand() -> None:
    # Layers 0, 1, 2 with p = 1/2: mean layer 0.25 + 2 * 0.125, and 1/8 never exits. Target 1.5.
    gates = [torch.full((1, 1), 0.5) for _ in range(3)]
    for leftover, mean_layer in (("zero", 0.5), ("last", 0.75)):
        found = losses.mean_exit_layer(gates, leftover)
        assert found.item() == pytest.approx(mean_layer)
        assert losses.route_loss(found, 3).item() == pytest.approx((1.5 - mean_layer) ** 2)


def test_route_loss_averages_before_it_squares() -> None:
    always, never = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    # One token leaves at layer 0, the other counts as layer 3: on average 1.5, the target is 2.
    gates = [always, never, never, never]
    mean_layer = losses.mean_exit_layer(gates, "last")
    assert losses.route_loss(mean_layer, 4).item() == pytest.approx(0.25)


def test_sampled_exits_are_decisions_with_the_probability_s_gradient() -> None:
    p = torch.full((2000,), 0.3, requires_grad=True)
    d = losses.sample_exits(p, torch.rand(2000, generator=torch.Generator().manual_seed(0)))
    assert set(d.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert d.mean().item() == pytest.approx(0.3, abs=0.05)
    d.sum().backward()
    assert torch.equal(p.grad, torch.ones(2000))


def test_quant_loss_by_hand() -> None:
    # alpha 0.55: values 0.55, -0.55, 0, 0.
    a = torch.tensor([[1.0, -1.0, 0.1, -0.1]], requires_grad=True)
    b = torch.tensor([[2.0, -2.0]])  # alpha 2: no difference
    mean = losses.quant_loss([a, b], "mean")
    assert mean.item() == pytest.approx((2 * 0.45**2 + 2 * 0.1**2) / 6)
    assert losses.quant_loss([a, b], "sum").item() == pytest.approx(mean.item() * 6 / 2)
    mean.backward()
    assert a.grad[0].tolist() == pytest.approx([0.9 / 6, -0.9 / 6, 0.2 / 6, -0.2 / 6])


def test_a_peak_is_the_largest_square_over_the_mean() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 4.0, 0.0, 0.0], [3.0, 1.0, -1.0, 1.0]])
    assert peak(x).item() == pytest.approx((1 + 4 + 9 / 3) / 3)
    assert peak(torch.zeros(2, 3)).item() == 0
