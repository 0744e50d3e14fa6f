"""Operations for training: library kernels, float32 or bfloat16 products, gradients.

The same names as in `exact`; `layers` and `model` are written once over either. Values differ from
the definition's by rounding only (order of sums, and bfloat16 products under autocast).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitskip_ref.config import odd_part
from bitskip_ref.constants import SCALE_FLOOR
from bitskip_ref.hartley import hartley
from bitskip_train.attention import grouped_attention
from bitskip_train.functions import QuantizeActivations, TernaryProduct


class Prepared(NamedTuple):
    """Quantized weights of linear layers that share an input, one below the other."""

    codes: Tensor  # [out, in], whole numbers in the dtype of the product
    alpha: Tensor  # f32 [out], the scale of each row or of its tensor
    scaled: Tensor | None  # codes * alpha in the dtype of the product, for the backward pass
    largest: int  # of the codes' magnitudes: 1 (ternary) or 127 (int8)


Rotations = dict[int, tuple[Tensor, ...]]
"""Padded width -> factors of the Hadamard matrix (`FastOps.rotations`)."""


class FastOps:
    """Training arithmetic; linear layers multiply in `dtype` (float32 or bfloat16)."""

    exact = False
    causal = True  # False: SPEC 10 row 19, every position sees all others

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    # ---- norms and elementary functions ---------------------------------------------

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """SPEC 3: layer norm where there is a bias, RMS norm otherwise. f32 [..., n] -> f32."""
        x = x.float()
        if bias is None:
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x.float())

    def relu2(self, x: Tensor) -> Tensor:
        return F.relu(x.float()).square()

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    # ---- linear layers --------------------------------------------------------------

    def weight_scale(self, w: Tensor) -> Tensor:
        """SPEC 4.1: alpha, f32 scalar, of a tensor [out, in]."""
        return w.abs().mean().clamp_min(SCALE_FLOOR)

    def prepare(
        self, weights: Sequence[Tensor], scales: Sequence[Tensor | None], ternary: bool = True
    ) -> Prepared:
        """Quantize (SPEC 4.1, 4.8) full-precision weights f32 (out_i, in), recording no gradient.

        A weight with a scale (f32 [1] or [out_i]) is loaded: int8 codes already, taken as they are.
        """
        codes, alphas = [], []
        for w, alpha in zip(weights, scales, strict=True):
            w = w.detach()
            if alpha is None and ternary:
                alpha = self.weight_scale(w)
                w = ternary_codes(w, alpha)
            elif alpha is None:
                w, steps = self.quantize(w, 8)
                alpha = steps[:, 0]
            codes.append(w.to(self.dtype))
            alphas.append(alpha.expand(w.shape[0]))
        whole, alpha = torch.cat(codes), torch.cat(alphas)
        scaled = None if self.exact else whole * alpha[:, None].to(self.dtype)
        return Prepared(whole, alpha, scaled, 1 if ternary else 127)

    def quantize(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """SPEC 4.2 with straight-through gradient: codes in the product's dtype, step f32."""
        return QuantizeActivations.apply(x, bits, self.dtype)

    def ternary_product(
        self, codes: Tensor, step: Tensor, prepared: Prepared, weights: Sequence[Tensor]
    ) -> Tensor:
        """SPEC 4.3, 4.8: [..., in] -> [..., sum of out_i]."""
        return TernaryProduct.apply(
            codes, step, prepared.codes, prepared.scaled, prepared.alpha, *weights
        )

    def finish(self, y: Tensor, rotations: Rotations) -> Tensor:
        """What a linear layer does to its product [..., out]: nothing (readings differ)."""
        return y

    def float_product(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Unquantized product with weights (out_i, in): [..., in] -> [..., sum of out_i]."""
        w = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        return F.linear(x.to(self.dtype), w.to(self.dtype))

    def rotations(self, widths: Sequence[int], device: torch.device) -> Rotations:
        """What `rotate` needs for inputs of these widths; made ahead, outside compiled code."""
        found: Rotations = {}
        for width in widths:
            n = 1 << (width - 1).bit_length()
            # H(a * b) is the Kronecker product of H(a) and H(b): two small products, which pay
            # from 1024 on: there, with the gradient, 7 times in float32, 1.3 times in bfloat16.
            sizes = (n,) if n < 1024 else (1 << (n.bit_length() - 1) // 2, 1 << n.bit_length() // 2)
            found[n] = tuple(hadamard_matrix(size, self.dtype, device) for size in sizes)
        return found

    def turns(self, group: str) -> bool:
        """Whether a group of linear layers (`layers.GROUPS`) is transformed (readings differ)."""
        return True

    def rotate(self, x: Tensor, rotations: Rotations) -> Tensor:
        """SPEC 5.1: zero-pad to a power of two and transform, as products with the matrix H.

        H is symmetric, so its transpose, which the gradient needs, is the transform itself.
        """
        width = x.shape[-1]
        n = 1 << (width - 1).bit_length()
        factors = rotations[n]
        x = x.to(self.dtype)
        if len(factors) == 1:
            return x @ factors[0][:width]
        left, right = factors
        grid = F.pad(x, (0, n - width)).unflatten(-1, (len(left), len(right)))
        return (left @ (grid @ right)).flatten(-2)

    def unpadded_rotations(self, widths: Sequence[int], device: torch.device) -> Rotations:
        """What `rotate_unpadded` needs for inputs of these widths."""
        found: Rotations = {}
        for width in set(widths):
            m = odd_part(width)
            (halves,) = FastOps.rotations(self, (width // m,), device).values()
            left = torch.tensor(hartley(m) / math.sqrt(m)).to(device, self.dtype)
            found[width] = (left, *halves)
        return found

    def rotate_unpadded(self, x: Tensor, rotations: Rotations) -> Tensor:
        """SPEC 5.3: [..., n] -> [..., n]."""
        left, *halves = rotations[x.shape[-1]]
        grid = x.to(self.dtype).unflatten(-1, [len(left), *map(len, halves)])
        grid = grid @ halves[-1]
        if len(halves) == 2:
            grid = (halves[0] @ grid).flatten(-2)
        return (left @ grid).flatten(-2)

    # ---- embedding, heads, gates ----------------------------------------------------

    def embed(self, ids: Tensor, weight: Tensor, scale: Tensor | None, kind: str) -> Tensor:
        """Rows of the table: ids [B, T] -> f32 [B, T, D]. `kind` is the config's head_format."""
        return F.embedding(ids, weight)

    def head(self, x: Tensor, weight: Tensor, scale: Tensor | None, kind: str) -> Tensor:
        """Logits [..., V] of normed hidden states, in the product's dtype; training never rounds
        the head to int8."""
        return F.linear(x.to(self.dtype), weight.to(self.dtype))

    def gate_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """A routing gate's product, in float32."""
        return F.linear(x, weight)

    # ---- attention ------------------------------------------------------------------

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """SPEC 6.1: x [B, T, heads, E]; cos, sin f32 [T, E/2]."""
        x1, x2 = x.float().chunk(2, -1)
        c, s = cos[:, None, :], sin[:, None, :]
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1).to(x.dtype)

    def attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """SPEC 6.2, 6.3: q [B, T, H, E], keys and values [B, S, K, E] -> [B, T, H * E]."""
        batch, tokens, heads, dim = q.shape
        positions, groups = keys.shape[1:3]
        share = heads // groups
        if q.device.type != "cpu":
            return self._library_attention(q, keys, values)
        # On CPU, batched products with the heads of a group as rows are several times faster
        # (bfloat16) than the library's fused kernel, forward and backward.
        q = (q * (1.0 / math.sqrt(dim))).unflatten(2, (groups, share))
        q = q.transpose(1, 2).reshape(batch * groups, tokens * share, dim)
        k = keys.transpose(1, 2).reshape(batch * groups, positions, dim)
        v = values.transpose(1, 2).reshape(batch * groups, positions, dim)
        out = grouped_attention(q, k, v, tokens, self.causal)[0]
        out = out.view(batch, groups, tokens, share, dim)
        return out.transpose(1, 2).reshape(batch, tokens, heads * dim)

    def _library_attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens, positions = q.shape[1], keys.shape[1]
        mask = None
        if self.causal and tokens != positions:
            mask = torch.ones(tokens, positions, dtype=torch.bool, device=q.device)
            mask = mask.tril(positions - tokens)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
            attn_mask=mask, is_causal=self.causal and mask is None, enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)


def ternary_codes(w: Tensor, alpha: Tensor) -> Tensor:
    """SPEC 4.1: f32 [out, in] -> -1, 0 or 1 as f32 [out, in]; a tie gives 0.

    In float32 because compiled code for smaller integers is four times slower.
    """
    half = 0.5 * alpha
    return torch.gt(w, half).to(w.dtype) - torch.lt(w, -half).to(w.dtype)


@lru_cache(maxsize=32)
def hadamard_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal Sylvester matrix [n, n], symmetric and its own inverse; n a power of two."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return (h / math.sqrt(n)).to(device, dtype)
