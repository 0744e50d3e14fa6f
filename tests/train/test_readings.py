"""Other readings of the papers, as training's arithmetic has them (SPEC 10)."""

import math

import numpy as np
import pytest
import torch

from bitskip_ref.config import ConfigError, small_twin
from bitskip_train.checkpoint import load_checkpoint
from bitskip_train.data import pad_documents
from bitskip_train.draws import Draws
from bitskip_train.fast import FastOps
from bitskip_train.layers import Cache
from bitskip_train.model import BitskipModel
from bitskip_train.objective import Objective
from bitskip_train.readings import AfterOps, UnscaledOps, departures, public_init, shifted
from bitskip_train.settings import TrainConfig, check_settings
from tests.train.conftest import small_config, small_trainer


def _input(width: int = 48) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1))


def test_an_unscaled_transform_has_the_same_codes_and_larger_steps():
    x = _input()
    codes, step = {}, {}
    for ops in (FastOps(), UnscaledOps()):
        turned = ops.rotate(x, ops.rotations((48,), x.device))
        codes[type(ops)], step[type(ops)] = ops.quantize(turned, 8)
    assert torch.equal(codes[FastOps], codes[UnscaledOps])
    torch.testing.assert_close(step[UnscaledOps], step[FastOps] * math.sqrt(64))


def test_after_transforms_quantized_values():
    x, ops = _input(), AfterOps()
    rotations = ops.rotations((48,), x.device)
    values, step = ops.quantize(ops.rotate(x, rotations), 8)
    plain = FastOps()
    codes, same = plain.quantize(x, 8)
    assert torch.equal(step, same)
    torch.testing.assert_close(values, plain.rotate(codes, rotations))
    assert not torch.equal(values, values.round())  # no second quantization


@pytest.mark.parametrize("form", ["unscaled", "after", "o_down"])
def test_a_form_changes_the_model_and_trains(form):
    config = small_twin("bitskip-v3").replace(hidden_size=64)
    model = BitskipModel(config, torch.Generator().manual_seed(0))
    ids = torch.arange(12)[None]
    before = model(ids)[4]
    model.reading = TrainConfig(hadamard_form=form)
    after = model(ids)[4]
    assert not torch.equal(before, after)
    after.square().mean().backward()
    assert all(p.grad.isfinite().all() for _, p in model.quantized_weights())


def test_o_and_down_alone_are_transformed():
    """With q, k, v, gate and up as without the transform, down as with it."""
    torch.manual_seed(0)
    config = small_twin("bitskip-v1").replace(hidden_size=64, intermediate_size=128)
    plain, turned = BitskipModel(config), BitskipModel(config.replace(hadamard=True))
    turned.load_state_dict(plain.state_dict())
    turned.reading = TrainConfig(hadamard_form="o_down")
    for group, same in (("qkv", True), ("up", True), ("o", False), ("down", False)):
        width = turned.config.intermediate_size if group == "down" else 64
        x = torch.randn(1, 5, width)
        found = []
        for model in (plain, turned):
            ops = model.ops()
            found.append(model.block(0).linear(group, x, model.start(ops, "none", 0, 5))[0])
        assert torch.equal(*found) is same, group


def test_targets():
    ids = torch.arange(5)[None]
    assert shifted(ids, "next").tolist() == [[1, 2, 3, 4]]
    assert shifted(ids, "same").tolist() == [[0, 1, 2, 3]]


def test_padding_fills_and_cuts_documents():
    tokens = np.array([5, 6, 0, 7, 0, 1, 2, 3, 4, 5, 0], np.uint16)
    padded = pad_documents(tokens, 4, 0)
    assert padded.dtype == np.uint16
    assert padded.reshape(-1, 4).tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]]


def test_a_form_without_hadamard_is_refused():
    with pytest.raises(ConfigError, match="needs model"):
        check_settings(small_twin("bitskip-v1"), TrainConfig(context=32, hadamard_form="after"))
    with pytest.raises(ConfigError, match="must be a power of two, and is 48"):
        check_settings(small_twin("bitskip-v3"), TrainConfig(context=32, hadamard_form="o_down"))


def _ids(batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (batch, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("preset", ["bitskip-v1", "bitskip-v3", "llama3"])
def test_without_a_mask_a_later_token_changes_an_earlier_logit(preset):
    model = BitskipModel(small_twin(preset), torch.Generator().manual_seed(0))
    ids, other = _ids(), _ids()
    other[0, -1] += 1
    for mask, leaks in (("causal", False), ("none", True)):
        model.reading = TrainConfig(mask=mask)
        one, two = (model.logits(model(x)[4], 4)[0, :-1] for x in (ids, other))
        assert torch.equal(one, two) is not leaks
        assert (one != two).any(-1).all() == leaks  # every earlier position, the first among them


def test_attention_without_a_mask_is_the_plain_formula():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads, 8, generator=g) for heads in (4, 2, 2))
    ops = FastOps()
    ops.causal = False
    k4, v4 = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k4) / math.sqrt(8)
    expected = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v4).flatten(2)
    torch.testing.assert_close(ops.attention(q, k, v), expected)
    torch.testing.assert_close(ops._library_attention(q, k, v), expected)


def _sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _public(hadamard: bool) -> BitskipModel:
    config = small_config("wt2-h" if hadamard else "wt2-baseline").replace(intermediate_size=32)
    if not hadamard:
        config = config.replace(sub_norm=False, embedding_norm=False)
    model = BitskipModel(config, torch.Generator().manual_seed(0))
    model.reading = TrainConfig(linear_form="public")
    return model


def _fake_quantized(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of 8-bit activations and ternary weights, as the public code writes them."""
    s = x.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    values = (x * 127 / s).round().clamp(-127, 127) * s / 127
    alpha = w.abs().mean()
    return values, alpha * ((w > 0.5 * alpha).float() - (w < -0.5 * alpha).float())


@pytest.mark.parametrize("hadamard", [False, True])
def test_public_linear_layers_are_the_public_codes_formula(hadamard):
    model = _public(hadamard)
    block, x = model.block(0), _input(model.config.hidden_size)[None]
    run = model.start(model.ops(), "none", 0, x.shape[1])
    for name, found in zip(
        ("q_proj", "k_proj", "v_proj"), block.linear("qkv", x, run), strict=True
    ):
        values, w = _fake_quantized(x, getattr(block, name).weight)
        if hadamard:
            turned = values @ _sylvester(x.shape[-1])
            expected = (turned @ w.t()) @ _sylvester(len(w))
        else:
            expected = torch.relu(values @ w.t()) ** 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_public_bit_linear_squares_twice_between_up_and_down():
    model = _public(False)
    block, x = model.block(0), _input(model.config.hidden_size)[None]
    run = model.start(model.ops(), "none", 0, x.shape[1])
    seen = {}
    block.ffn(x, run, lambda stage, values: seen.setdefault(stage, values))
    values, w = _fake_quantized(x, block.up_proj.weight)
    torch.testing.assert_close(seen["act"], torch.relu(values @ w.t()) ** 4, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("hadamard", [False, True])
def test_public_gradients_are_finite_and_not_all_zero(hadamard):
    model = _public(hadamard)
    with torch.no_grad():
        for _, p in model.quantized_weights():
            p.mul_(20)
    model.logits(model(_ids())[4], 4).square().mean().backward()
    for name, p in model.quantized_weights():
        assert p.grad.isfinite().all(), name
    assert any(p.grad.any() for _, p in model.quantized_weights())


def test_public_init_is_uniform_and_a_tenth_without_hadamard():
    for hadamard, factor in ((False, 0.1), (True, 1.0)):
        model = _public(hadamard)
        head = model.lm_head.weight.clone()
        torch.manual_seed(0)
        public_init(model, hadamard)
        for _, p in model.quantized_weights():
            bound = factor / math.sqrt(p.shape[1])
            assert p.abs().max() <= bound and p.abs().max() > 0.9 * bound
            assert float(p.detach().abs().mean()) == pytest.approx(bound / 2, rel=0.25)
        assert torch.equal(head, model.lm_head.weight)


def test_raw_exits_read_hidden_states_without_the_norm(tmp_path):
    model = BitskipModel(small_twin("bitskip-v1"), torch.Generator().manual_seed(0))
    hidden = model(_ids(), collect=[2])[2]
    raw = model.logits(hidden, 2, normed=False)
    torch.testing.assert_close(raw, hidden @ model.lm_head.weight.t())
    ids = _ids(3)
    settings = TrainConfig(context=11, exit_lambda=1.0, exit_last=0)
    terms = {}
    for raw_exits in (False, True):
        train = settings.replace(exit_raw=raw_exits)
        model.zero_grad()
        terms[raw_exits] = Objective(model, train, torch.device("cpu")).backward(
            ids, 0, Draws(0, 0, 3)
        )
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert terms[False]["loss"] == terms[True]["loss"]
    assert terms[False]["exit_loss"] != terms[True]["exit_loss"]


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("llama3", {"linear_form": "public"}),
        ("wt2-h", {"linear_form": "public", "hadamard_form": "after"}),
    ],
)
def test_readings_that_do_not_fit_the_model_are_refused(preset, settings):
    with pytest.raises(ConfigError, match="linear_form = 'public'"):
        check_settings(small_twin(preset), TrainConfig(context=32, **settings))


def test_public_outputs_must_be_powers_of_two():
    config = small_twin("wt2-h").replace(num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="powers of two"):
        check_settings(config, TrainConfig(context=32, linear_form="public"))


@pytest.mark.parametrize("reading", [{"mask": "none"}, {"linear_form": "public"}])
def test_a_checkpoint_keeps_its_reading(tmp_path, reading):
    config = small_config("wt2-h").replace(intermediate_size=32)
    trainer = small_trainer(tmp_path, config, steps=1, save_every=1, **reading)
    assert trainer.run()
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert departures(loaded.train) == [f"{k} = {v!r}" for k, v in reading.items()]
    model = BitskipModel.restored(loaded)
    ids = _ids()
    torch.testing.assert_close(model(ids)[4], trainer.model(ids)[4])
    model.reading = TrainConfig()
    assert not torch.equal(model(ids)[4], trainer.model(ids)[4])


def test_what_a_reading_cannot_do_is_refused():
    model = _public(True)
    with pytest.raises(ValueError, match="transforms quantized values only"):
        model(_ids(), bypass="activations")
    model.reading = TrainConfig(mask="none")
    with pytest.raises(ValueError, match="without a causal mask"):
        model(_ids(), cache=Cache(model.config))
    model.arithmetic = "exact"
    with pytest.raises(
        ValueError, match="mask = 'none': exact arithmetic has the definition alone"
    ):
        model(_ids())
