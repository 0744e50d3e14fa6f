"""The model in training arithmetic: names, shapes, masks, layer dropout, bypasses, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitskip_ref.config import HEAD_BITS, PRESETS, small_twin
from bitskip_ref.tensors import parameter_shapes
from bitskip_train.fast import FastOps
from bitskip_train.model import INIT_STD, BitskipModel
from tests.helpers import OPTIONS, QUANTIZED, random_parameters, twin


def make(name: str, seed: int = 0) -> BitskipModel:
    return BitskipModel(twin(name), torch.Generator().manual_seed(seed))


def randomized(name: str, **changes: object) -> BitskipModel:
    """With weights and norms of ordinary size, so that every part shows in the output."""
    config = twin(name).replace(**changes)
    model = BitskipModel(config)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in random_parameters(config).items()})
    return model


def ids(batch: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def gap(expected: Tensor, actual: Tensor) -> float:
    """Root mean square difference by root mean square of what is expected."""
    return float(
        (expected - actual.float()).square().mean().sqrt() / expected.square().mean().sqrt()
    )


@pytest.mark.parametrize("name", [*PRESETS, *OPTIONS])
def test_state_names_are_the_formats(name: str) -> None:
    model = make(name)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert shapes == parameter_shapes(model.config)
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())


def test_initial_weights() -> None:
    model = make("bitskip-v1")
    assert torch.equal(model.block(1).q_proj.weight, make("bitskip-v1").block(1).q_proj.weight)
    assert not torch.equal(
        model.block(1).q_proj.weight, make("bitskip-v1", 1).block(1).q_proj.weight
    )
    assert float(model.embed_tokens.weight.detach().std()) == pytest.approx(INIT_STD, rel=0.05)
    assert float(model.block(0).down_proj.weight.detach().std()) == pytest.approx(
        INIT_STD / 8**0.5, rel=0.05
    )
    torch.manual_seed(4)
    first = BitskipModel(model.config)
    torch.manual_seed(4)
    assert torch.equal(first.lm_head.weight, BitskipModel(model.config).lm_head.weight)


@pytest.mark.parametrize("name", [*QUANTIZED, *OPTIONS])
def test_fast_is_near_exact(name: str) -> None:
    """Block by block from the same input: over many blocks, a code rounded the other way grows.

    bfloat16 rounds what the Hadamard transform gives, which moves 4-bit codes most. Heads are
    stored as integers, which training does not imitate: fewer bits, farther away.
    """
    model = randomized(name)
    model.arithmetic = "exact"
    hidden = model(ids(), collect=range(5))
    logits = model.logits(hidden[4], 4)
    model.arithmetic = "fast"
    half_bound = 0.02 if model.config.activation_bits == 8 else 0.2
    for dtype, bound in ((torch.float32, 0.002), (torch.bfloat16, half_bound)):
        run = model.start(FastOps(dtype), "none", 0, 9)
        for i in range(4):
            with torch.no_grad():
                actual = model.run_block(i, hidden[i], run)
            assert actual.dtype == torch.float32
            assert gap(hidden[i + 1], actual) < bound
    with torch.no_grad():
        bound = 0.02 * 2 ** (8 - HEAD_BITS.get(model.config.head_format, 8))
        assert gap(logits, model.logits(hidden[4], 4)) < bound


@pytest.mark.parametrize("name", [*PRESETS, *OPTIONS])
@pytest.mark.parametrize("arithmetic", ["fast", "exact"])
def test_no_token_sees_the_future(name: str, arithmetic: str) -> None:
    model = randomized(name)
    model.arithmetic = arithmetic
    before, changed = ids(), ids()
    changed[:, 5:] = (changed[:, 5:] + 1) % 97
    with torch.no_grad():
        a, b = model(before)[4], model(changed)[4]
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.equal(a[:, 5], b[:, 5])


def test_collect_and_exit_layer() -> None:
    model = randomized("bitskip-v1")
    with torch.no_grad():
        full = model(ids(), collect=(0, 1, 3))
        assert list(full) == [0, 1, 3, 4]
        for n in (1, 3):
            early = model(ids(), exit_layer=n)
            assert list(early) == [n] and torch.equal(early[n], full[n])


# ---- layer dropout ------------------------------------------------------------------


def test_dropped_blocks_are_the_identity() -> None:
    model = randomized("wt2-bitskip")
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    hidden = model(ids(), keep=keep, collect=range(5))
    for i, row in enumerate(keep):
        whole = model.run_block(i, hidden[i], model.start(model.ops(), "none", 0, 9))
        for b, kept in enumerate(row):
            expected = whole[b] if kept else hidden[i][b]
            torch.testing.assert_close(hidden[i + 1][b], expected, rtol=1e-5, atol=1e-5)
            assert kept or torch.equal(hidden[i + 1][b], expected)


def test_dropped_samples_give_no_gradient() -> None:
    model = randomized("bitskip-v1")
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[1], keep[2, 1:] = False, False
    hidden = model(ids(), keep=keep)[4]
    hidden.square().mean().backward()
    for p in model.block(1).parameters():
        assert p.grad is not None and not p.grad.any()
    together = model.block(2).q_proj.weight.grad.clone()
    assert together.any()
    model.zero_grad()
    only = ids()[:1]
    (model(only, keep=keep[:, :1])[4].square().mean() / 3).backward()
    torch.testing.assert_close(model.block(2).q_proj.weight.grad, together, rtol=1e-4, atol=1e-7)


# ---- bypasses -----------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["fast", "exact"])
def test_bypassing_activations_too_is_the_float_model(arithmetic: str) -> None:
    model, twin_model = randomized("bitskip-v1"), randomized("llama3")
    for m in (model, twin_model):
        m.arithmetic = arithmetic
    with torch.no_grad():
        plain = model(ids())[4]
        weights = model(ids(), bypass="weights")[4]
        both = model(ids(), bypass="activations")[4]
        floats = twin_model(ids())[4]
        table = model.embed(ids(), model.ops())
        twin_table = twin_model.embed(ids(), twin_model.ops())
    if arithmetic == "fast":  # exact embeddings are rounded to int8 in one of the two
        assert torch.equal(both, floats)
    assert gap(twin_table, table) < 0.02
    assert 0 < gap(both, weights) < 0.1 < gap(both, plain)


# ---- between passes -----------------------------------------------------------------


def test_changed_weights_are_quantized_again() -> None:
    """The fused optimizer leaves version counters as they were: nothing may be kept by them."""
    model = randomized("bitskip-v2")
    with torch.no_grad():
        before = model(ids())[4]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(ids())[4].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = model(ids())[4]
    assert not torch.equal(before, after)
    fresh = BitskipModel(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(ids())[4], after)


@pytest.mark.parametrize("name", ["bitskip-v1", "bitskip-v2"])
def test_training_after_inference_mode(name: str) -> None:
    model = randomized(name, intermediate_size=70)
    with torch.inference_mode():
        model(ids())
    model(ids())[4].sum().backward()
    assert model.block(0).q_proj.weight.grad.any()


# ---- errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_layer": 0}, "exit 0"),
        ({"exit_layer": 5}, "1..4"),
        ({"exit_layer": 2, "collect": (3,)}, "collect"),
        ({"bypass": "all"}, "bypass 'all'"),
        ({"keep": torch.ones(3, 3, dtype=torch.bool)}, "keep of shape"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("tiny")(ids(), **arguments)


def test_wrong_calls() -> None:
    model = make("tiny")
    with pytest.raises(ValueError, match="context of 64"):
        model(ids(1, 65))
    with pytest.raises(ValueError, match="B, T"):
        model(ids()[0])
    with pytest.raises(ValueError, match="no routing gates"):
        model.gate(model(ids())[4], 4)
    with pytest.raises(ValueError, match="exit 5"):
        model.logits(model(ids())[4], 5)


def test_quantized_weights() -> None:
    config = small_twin("bitnet-2b4t")
    names = [name for name, _ in make("bitnet-2b4t").quantized_weights()]
    assert len(names) == 4 * 7 and set(names) <= set(parameter_shapes(config))
    assert not list(make("llama3").quantized_weights())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitskip-v1", "wt2-bitskip"])
def test_compiled_blocks(name: str) -> None:
    """Compiled training is training; exact evaluation does not use what was compiled."""
    model = randomized(name)
    keep = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)

    def gradient() -> Tensor:
        model.zero_grad()
        model(ids(), keep=keep)[4].square().mean().backward()
        return model.block(1).q_proj.weight.grad.clone()

    expected = gradient()
    model.arithmetic = "exact"
    bits = model(ids())[4]
    model.arithmetic = "fast"
    for block in model.layers:
        block.compile()
    assert gap(expected, gradient()) < 0.02
    model.arithmetic = "exact"
    assert torch.equal(model(ids())[4], bits)
