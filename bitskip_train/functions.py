"""Straight-through gradients of the quantized linear layers (SPEC 4, 10.4).

A quantized activation is passed on as (codes, step), value = codes * step. The gradient that flows
back through `codes` is the gradient with respect to that *value*: `TernaryProduct` sends it and
`QuantizeActivations` hands it on unchanged, which is the identity straight-through estimator.
`step` carries no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bitskip_ref.constants import SCALE_FLOOR


class QuantizeActivations(Function):
    """SPEC 4.2 over the last axis: [..., n] -> codes [..., n] of `dtype`, step f32 [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        largest = float(2 ** (bits - 1) - 1)
        ctx.dtype = x.dtype
        x = x.float()
        s = x.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
        codes = (x * (largest / s)).round().to(dtype)
        step = s / largest
        ctx.mark_non_differentiable(step)
        return codes, step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].to(ctx.dtype), None, None


class TernaryProduct(Function):
    """SPEC 4.3 for linear layers that share an input, as one product.

    codes [..., in] and step f32 [..., 1] from `QuantizeActivations`; ternary [out, in] in -1..1 and
    alpha f32 [out], scaled = ternary * alpha, for the layers' weights one below the other.
    `weights` are the full-precision tensors (out_i, in) that receive the gradient. Returns
    [..., out] of codes' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        step: Tensor,
        ternary: Tensor,
        scaled: Tensor,
        alpha: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(codes, step, scaled)
        ctx.rows = [w.shape[0] for w in weights]
        acc = codes @ ternary.t()
        return (acc.float() * (step * alpha)).to(codes.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, step, scaled = ctx.saved_tensors
        grad = grads[0]
        grad_x = grad @ scaled if ctx.needs_input_grad[0] else None
        value = (codes.float() * step).to(grad.dtype)
        grad_w = grad.flatten(0, -2).t() @ value.flatten(0, -2)
        return grad_x, None, None, None, None, *grad_w.float().split(ctx.rows)


class PassThrough(Function):
    """The identity on x that gives each of `parameters` a zero gradient.

    For blocks that no sample of a batch runs: every parameter takes part in every step, so
    optimizers and distributed wrappers see the same set each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros_like(p) for p in ctx.saved_tensors)
