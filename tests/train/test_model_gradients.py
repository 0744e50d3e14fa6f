"""Straight-through gradients against plain formulations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitskip_ref.arithmetic.hadamard import fwht
from bitskip_train.attention import ROWS, grouped_attention, grouped_attention_backward
from bitskip_train.fast import FastOps
from bitskip_train.functions import PassThrough
from bitskip_train.layers import Block
from bitskip_train.model import BitskipModel
from tests.helpers import OPTIONS, QUANTIZED, twin


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """The value of one, the gradient of the other."""
    return x + (value - x).detach()


def plain_ternary(x: Tensor, weights: list[Tensor], bits: int) -> Tensor:
    """SPEC 4.1 to 4.3 in float64 by autograd alone."""
    largest = 2 ** (bits - 1) - 1
    s = x.detach().abs().amax(-1, keepdim=True)
    x = straight_through(x, (x * largest / s).round() * s / largest)
    outputs = []
    for w in weights:
        alpha = w.detach().abs().mean()
        ternary = torch.sign(w) * (w.abs() > 0.5 * alpha)
        outputs.append(x @ straight_through(w, alpha * ternary).t())
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
def test_ternary_linear(bits: int, dtype: torch.dtype, bound: float) -> None:
    ops = FastOps(dtype)
    x = seeded(3, 5, 48).requires_grad_()
    weights = [seeded(rows, 48, seed=rows).requires_grad_() for rows in (32, 16)]
    codes, step = ops.quantize(x, bits)
    y = ops.ternary_product(codes, step, ops.prepare(weights, [None, None]), weights)
    out_grad = seeded(3, 5, 48, seed=9)
    y.backward(out_grad.to(dtype))
    copies = [t.detach().double().requires_grad_() for t in (x, *weights)]
    expected = plain_ternary(copies[0], copies[1:], bits)
    expected.backward(out_grad.double())
    for actual, wanted in [(y, expected)] + [
        (a.grad, b.grad) for a, b in zip((x, *weights), copies, strict=True)
    ]:
        gap = (actual.double() - wanted).abs().max() / wanted.abs().max()
        assert gap < bound


@pytest.mark.parametrize("width", [48, 64, 3000])
def test_rotation_and_its_gradient(width: int) -> None:
    ops = FastOps()
    n = 1 << (width - 1).bit_length()
    rotations = ops.rotations([width], torch.device("cpu"))
    assert len(rotations[n]) == (1 if n < 1024 else 2)
    x = seeded(7, width).requires_grad_()
    y = ops.rotate(x, rotations)
    padded = np.pad(x.detach().numpy(), [(0, 0), (0, n - width)])
    np.testing.assert_allclose(y.detach(), fwht(padded), atol=2e-6)
    grad = seeded(7, n, seed=1)
    y.backward(grad)
    # H is symmetric: H^T g = H g, of which the padding's part is dropped.
    np.testing.assert_allclose(x.grad, fwht(grad.numpy())[:, :width], atol=2e-6)


@pytest.mark.parametrize(("tokens", "positions"), [(5, 5), (3, 7)])
def test_causal_attention(tokens: int, positions: int) -> None:
    shapes = [(2, 2 * tokens, 4), (2, positions, 4), (2, positions, 4)]
    inputs = [seeded(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]

    def output(*qkv: Tensor) -> Tensor:
        return grouped_attention(*qkv, tokens, True)[0]

    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("causal", [True, False])
def test_compiled_code_is_told_what_the_attention_returns(dtype: torch.dtype, causal: bool) -> None:
    """Heads of one sample lie apart in memory: a batch of 1, or all others skipped."""
    q, keys, values = (
        seeded(tokens, 3, 4, seed=tokens).to(dtype).transpose(0, 1) for tokens in (10, 5, 5)
    )
    inputs = q, keys, values, 5, causal
    torch.library.opcheck(grouped_attention, inputs, test_utils="test_faketensor")
    weights = grouped_attention(*inputs)[1:]
    inputs = torch.ones_like(q), q, keys, values, weights, 5
    torch.library.opcheck(grouped_attention_backward, inputs, test_utils="test_faketensor")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "positions"), [(ROWS, ROWS), (2 * ROWS + 3, 2 * ROWS + 8)])
def test_attention_in_parts_is_the_library_s(tokens: int, positions: int, causal: bool) -> None:
    """Queries of two heads of one group, [B, T, H, E], over more tokens than are taken at once."""
    shapes = [(2, tokens, 2, 4), (2, positions, 1, 4), (2, positions, 1, 4)]
    q, keys, values = (seeded(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes))
    rows = q.reshape(2, tokens * 2, 4)
    plain = [x.transpose(1, 2) for x in (q, keys, values)]
    mask = torch.ones(tokens, positions, dtype=torch.bool).tril(positions - tokens)
    want = scaled_dot_product_attention(
        *plain, attn_mask=mask if causal else None, scale=1.0, enable_gqa=True
    ).transpose(1, 2)
    found = grouped_attention(rows, keys[:, :, 0], values[:, :, 0], tokens, causal)[0]
    torch.testing.assert_close(found.view_as(want), want)
    probe = seeded(*want.shape, seed=9).double()
    leaves = (q, keys, values)
    gradients = torch.autograd.grad(found.view_as(want), leaves, probe)
    for gradient, wanted in zip(gradients, torch.autograd.grad(want, leaves, probe), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("ffn", ["swiglu", "relu2", "gated_relu2"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_float_block(ffn: str, norm: str) -> None:
    """Everything between the quantizers, by finite differences."""
    config = twin("llama3").replace(
        hidden_size=8, head_dim=4, intermediate_size=6, ffn=ffn, norm=norm, sub_norm=True,
        num_key_value_heads=2, norm_position="post" if norm == "layer" else "pre",
    )  # fmt: skip
    model = BitskipModel(config, torch.Generator().manual_seed(0))
    block: Block = model.block(0)
    run = model.start(FastOps(), "none", 0, 4)
    x = seeded(1, 4, 8).requires_grad_()
    direction = [seeded(*t.shape, seed=i) for i, t in enumerate((x, *block.parameters()))]
    probe = seeded(1, 4, 8, seed=50)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "proj" in name:
                p.mul_(20)

    def loss(shift: float) -> Tensor:
        tensors = (x, *block.parameters())
        with torch.no_grad():
            for t, d in zip(tensors, direction, strict=True):
                t.add_(shift * d)
        value = (block(x, run) * probe).sum()
        return value

    loss(0.0).backward()
    slope = sum(
        (t.grad * d).sum() for t, d in zip((x, *block.parameters()), direction, strict=True)
    )
    step = 1e-3
    with torch.no_grad():
        above = loss(step)
        below = loss(-2 * step)
    assert abs((above - below) / (2 * step) - slope) < 1e-2 * abs(slope) + 1e-2


@pytest.mark.parametrize("name", [*QUANTIZED, *OPTIONS, "llama3"])
def test_every_parameter_learns(name: str) -> None:
    config = twin(name)
    model = BitskipModel(config, torch.Generator().manual_seed(0))
    layers = range(1, config.num_hidden_layers + 1)
    hidden = model(torch.arange(10)[None], collect=layers)
    loss = sum(model.logits(hidden[n], n).square().mean() for n in layers)
    if config.gates:
        loss = loss + sum(model.gate(hidden[n], n).mean() for n in layers)
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


def test_pass_through() -> None:
    x, p = seeded(3).requires_grad_(), seeded(2, 2).requires_grad_()
    y = PassThrough.apply(x, p)
    y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones(3))
    assert torch.equal(p.grad, torch.zeros(2, 2))
