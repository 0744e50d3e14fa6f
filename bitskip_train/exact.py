"""Operations with the definition's bits, for evaluation on CPU (SPEC 2 to 8).

Each elementwise operation below is one kernel call, rounded once; nothing may be compiled or
rewritten with fused operations. A scalar never stands above a division bar: PyTorch turns
`scalar / tensor` into a reciprocal and a product, which rounds twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitskip_ref.config import HEAD_BITS, odd_part
from bitskip_ref.constants import (
    EXP_COEFFICIENTS,
    EXP_MAX,
    EXP_MIN,
    LARGEST_WEIGHT,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    LOG_COEFFICIENTS,
    SCALE_FLOOR,
    SOFTMAX_UNIT,
    SQRT_HALF,
)
from bitskip_ref.hartley import hartley
from bitskip_train.fast import FastOps, Prepared, Rotations

STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHUNK = 1 << 21  # most values of a temporary: the sums by tree need their products in memory


def feature_sum(x: Tensor) -> Tensor:
    """SPEC 2.2 over the last axis: f32 [..., n] -> f32 [...]."""
    x = pad_last(x)
    n = x.shape[-1]
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n : 2 * n]
    return x[..., 0]


def position_sum(x: Tensor) -> Tensor:
    """SPEC 2.3 over the first axis: f32 [S, ...] -> f32 [...]."""
    n = 1 << (x.shape[0] - 1).bit_length()
    if n != x.shape[0]:
        x = torch.cat([x, x.new_zeros(n - x.shape[0], *x.shape[1:])])
    while x.shape[0] > 1:
        x = x[0::2] + x[1::2]
    return x[0] + 0.0


def pad_last(x: Tensor) -> Tensor:
    """Zero-pad the last axis to a power of two."""
    width = x.shape[-1]
    return F.pad(x, (0, (1 << (width - 1).bit_length()) - width))


def mean(x: Tensor) -> Tensor:
    """SPEC 2.4 over the last axis, which is kept: f32 [..., n] -> f32 [..., 1]."""
    total = feature_sum(x)[..., None]
    return total / torch.full_like(total, x.shape[-1])


def inverse_root(x: Tensor) -> Tensor:
    """1 / sqrt(x); the library's own float32 square root is not rounded correctly everywhere."""
    return torch.ones_like(x) / x.double().sqrt().float()


def exp(x: Tensor) -> Tensor:
    """SPEC 2.6: f32 -> f32."""
    x = x.clamp(EXP_MIN, EXP_MAX)
    k = (x * LOG2_E).round()
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = torch.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    power = ((k.to(torch.int32) + 127) << 23).view(torch.float32)  # 2^k, k in -126..127
    return ((p * (r * r) + r) + 1.0) * power


def log(x: Tensor) -> Tensor:
    """SPEC 2.9, of normal x > 0."""
    m, k = torch.frexp(x)
    small = m < SQRT_HALF
    m, k = torch.where(small, m + m, m), (k - small.int()).float()
    r = m - 1.0
    q = r * r
    p = torch.full_like(r, LOG_COEFFICIENTS[0])
    for c in LOG_COEFFICIENTS[1:]:
        p = p * r + c
    return (r + (((p * r) * q + k * LN2_LOW) - 0.5 * q)) + k * LN2_HIGH


def confidence(z: Tensor, measure: str) -> Tensor:
    """SPEC 8.5: logits f32 [V] -> `max`, `margin` or `entropy`, f32 []."""
    one = z.new_tensor(1.0)
    d = z - z.max()
    e = exp(d)
    total = feature_sum(e)
    if measure == "max":
        return one / total
    if len(z) == 1:
        return one
    if measure == "margin":
        return (one - exp(d.topk(2).values[1])) / total
    entropy = log(total) - feature_sum(e * d) / total
    return one - entropy / log(z.new_tensor(len(z)))


def butterflies(x: Tensor) -> Tensor:
    """SPEC 5.2 without its scale over the last axis: f32 [..., n], n a power of two."""
    n = x.shape[-1]
    h = n // 2
    while h:
        a, b = x.unflatten(-1, (n // (2 * h), 2, h)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        h //= 2
    return x


def relu(x: Tensor) -> Tensor:
    """SPEC 2.8: both zeros give +0."""
    return torch.where(x > 0, x, 0.0)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """SPEC 4.2 over the last axis: f32 [..., n] -> codes f32 [..., n], step f32 [..., 1]."""
    s = x.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
    largest = torch.full_like(s, 2 ** (bits - 1) - 1)
    return (x * (largest / s)).round(), s / largest


def integer_product(codes: Tensor, weights: Tensor, bound: int) -> Tensor:
    """Exact sums of products of integer-valued codes, as f32; |product| <= bound.

    Sums below 2^24 are exact in float32 in any order, below 2^53 in float64. A sum of nothing but
    zeros may come out as -0 from the library; + 0.0 makes it the integer's zero.
    """
    kind = torch.float32 if bound * codes.shape[-1] < 1 << 24 else torch.float64
    return (F.linear(codes.to(kind), weights.to(kind)) + 0.0).float()


def float_linear(x: Tensor, weights: Tensor) -> Tensor:
    """SPEC 4.5: f32 [..., in], [out, in] -> f32 [..., out]."""
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_empty(len(flat), len(weights))
    rows = max(1, CHUNK // x.shape[-1])
    for start in range(0, len(weights), rows):
        part = weights[start : start + rows].float()
        tokens = max(1, CHUNK // part.numel())
        for t in range(0, len(flat), tokens):
            products = flat[t : t + tokens, None, :] * part
            out[t : t + tokens, start : start + rows] = feature_sum(products)
    return out.unflatten(0, x.shape[:-1])


def int8_attention(
    q: Tensor, keys: Tensor, key_steps: Tensor, values: Tensor, value_steps: Tensor
) -> Tensor:
    """SPEC 6.8: turned q f32 [B, T, H, E] of the last T of S positions -> [B, T, H * E].

    keys, values: integer-valued codes f32 [B, S, K, E]; their steps f32 [B, S, K, 1].
    """
    batch, tokens, heads, dim = q.shape
    positions, groups = keys.shape[1:3]
    past, share = positions - tokens, heads // groups
    codes, step = quantize(q, 8)
    step = step * (1.0 / math.sqrt(dim))
    # Queries [B, K, G, T, E]; keys and values [B, K, 1, S, E], steps [B, K, 1, 1, S].
    codes, step = (x.unflatten(2, (groups, share)).permute(0, 2, 3, 1, 4) for x in (codes, step))
    # What is no finite number shows in its step; its codes, times 0, would reach earlier positions.
    values = values.double().nan_to_num(0.0)
    keys, values = (x.transpose(1, 2)[:, :, None] for x in (keys, values))
    key_steps, value_steps = (x.permute(0, 2, 3, 1)[:, :, None] for x in (key_steps, value_steps))
    exact = torch.float32 if 127 * 127 * dim < 1 << 24 else torch.float64
    codes, keys = codes.to(exact), keys.to(exact).transpose(-1, -2)
    out = q.new_empty(batch, groups, share, tokens, dim)
    rows = max(1, CHUNK // (batch * heads * positions))
    for start in range(0, tokens, rows):
        end = min(start + rows, tokens)
        seen = past + end  # no row of this chunk sees further
        hidden = torch.arange(seen) > past + torch.arange(start, end)[:, None]  # [rows, seen]
        products = (codes[..., start:end, :] @ keys[..., :seen] + 0.0).float()
        scores = products * (step[..., start:end, :] * key_steps[..., :seen])
        largest = scores.masked_fill(hidden, -math.inf).amax(-1, keepdim=True)
        e = exp(scores - largest).masked_fill(hidden, 0.0)  # [B, K, G, rows, seen]
        w = (e * value_steps[..., :seen]).masked_fill(hidden, 0.0)
        top = w.amax(-1, keepdim=True)
        most = torch.full_like(top, LARGEST_WEIGHT)
        w = (w * (most / top)).round().double()
        sums = (w @ values[..., :seen, :] + 0.0).float()
        total = (e * SOFTMAX_UNIT).round().long().sum(-1, keepdim=True).float()
        out[..., start:end, :] = sums * ((top / most) / (total / SOFTMAX_UNIT))
    return out.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads * dim)


class ExactOps(FastOps):
    """The definition's arithmetic; overrides all of `FastOps` but the unquantized products."""

    exact = True

    def __init__(self) -> None:
        super().__init__(torch.float32)

    # ---- norms and elementary functions ---------------------------------------------

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if bias is None:
            return (x * inverse_root(mean(x * x) + eps)) * weight
        c = x - mean(x)
        return (c * inverse_root(mean(c * c) + eps)) * weight + bias

    def silu(self, x: Tensor) -> Tensor:
        return x / (exp(-x) + 1.0)

    def relu2(self, x: Tensor) -> Tensor:
        r = relu(x)
        return r * r

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.ones_like(x) / (exp(-x) + 1.0)

    # ---- linear layers --------------------------------------------------------------

    def weight_scale(self, w: Tensor) -> Tensor:
        total = feature_sum(feature_sum(w.abs()))
        return (total / torch.full_like(total, w.numel())).clamp_min(SCALE_FLOOR)

    def quantize(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return quantize(x, bits)

    def ternary_product(
        self, codes: Tensor, step: Tensor, prepared: Prepared, weights: Sequence[Tensor]
    ) -> Tensor:
        bound = 127 * prepared.largest
        return integer_product(codes, prepared.codes, bound) * (step * prepared.alpha)

    def rotate(self, x: Tensor, rotations: Rotations) -> Tensor:
        x = butterflies(pad_last(x))
        return x * (1.0 / math.sqrt(x.shape[-1]))

    def unpadded_rotations(self, widths: Sequence[int], device: torch.device) -> Rotations:
        return {}

    def rotate_unpadded(self, x: Tensor, rotations: Rotations) -> Tensor:
        n = x.shape[-1]
        m = odd_part(n)
        rows = butterflies(x.unflatten(-1, (m, n // m)))
        if m > 1:
            table = torch.tensor(hartley(m))
            total = table[:, 0, None] * rows[..., None, 0, :]
            for j in range(1, m):
                total = total + table[:, j, None] * rows[..., None, j, :]
            rows = total
        return rows.flatten(-2) * (1.0 / math.sqrt(n))

    # ---- embedding, heads, gates ----------------------------------------------------

    def embed(self, ids: Tensor, weight: Tensor, scale: Tensor | None, kind: str) -> Tensor:
        rows = weight[ids]
        if scale is not None:
            return rows.float() * scale[ids][..., None]
        if kind in HEAD_BITS:
            codes, step = quantize(rows, HEAD_BITS[kind])
            return codes * step
        return rows.to(STORED[kind]).float()

    def head(self, x: Tensor, weight: Tensor, scale: Tensor | None, kind: str) -> Tensor:
        if kind not in HEAD_BITS:
            return float_linear(x, weight.to(STORED[kind]))
        rows, steps = (weight, scale) if scale is not None else quantize(weight, HEAD_BITS[kind])
        codes, step = quantize(x, 8)
        return integer_product(codes, rows, 127 * 127) * (step * steps.view(-1))

    def gate_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.head(x, weight, None, "int8")

    # ---- attention ------------------------------------------------------------------

    def attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A few query rows at a time; features or positions lead, so that halves are contiguous."""
        batch, tokens, heads, dim = q.shape
        positions, groups = keys.shape[1:3]
        share = heads // groups
        past = positions - tokens
        scale = 1.0 / math.sqrt(dim)
        # Features first: q [E, B, K, G, T, 1], keys [E, B, K, 1, 1, S].
        turned = pad_last(q).permute(3, 0, 2, 1).unflatten(2, (groups, share))[..., None]
        turned = turned.contiguous()
        seen_keys = pad_last(keys).permute(3, 0, 2, 1)[:, :, :, None, None, :].contiguous()
        # Positions first: [S, B, K, 1, 1, E].
        seen_values = values.transpose(0, 1)[:, :, :, None, None, :].contiguous()
        out = q.new_empty(batch, groups, share, tokens, dim)
        rows = max(1, CHUNK // (batch * heads * positions * dim))
        for start in range(0, tokens, rows):
            end = min(start + rows, tokens)
            length = past + end  # no row of this chunk sees further
            scores = self._scores(turned[..., start:end, :], seen_keys[..., :length]) * scale
            position = torch.arange(length)
            hidden = position > past + torch.arange(start, end)[:, None]  # [rows, length]
            largest = scores.masked_fill(hidden, -math.inf).amax(-1, keepdim=True)
            e = exp(scores - largest).masked_fill(hidden, 0.0)  # [B, K, G, rows, length]
            e = e.movedim(-1, 0)[..., None].contiguous()  # [length, B, K, G, rows, 1]
            products = e * seen_values[:length]
            # 0 times a hidden value that is not finite is a NaN.
            products = products.masked_fill(hidden.T[:, None, None, None, :, None], 0.0)
            out[..., start:end, :] = position_sum(products) / position_sum(e)
        return out.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads * dim)

    @staticmethod
    def _scores(q: Tensor, keys: Tensor) -> Tensor:
        """SPEC 2.2 over the leading feature axis of q * keys, a power of two long."""
        x = q * keys
        while len(x) > 1:
            half = len(x) // 2
            x = x[:half] + x[half:]
        return x[0]
