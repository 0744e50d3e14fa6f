"""Parts of the model, written once over `fast` or `exact` operations (SPEC 3 to 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitskip_ref.cache import CacheFill, cached_arrays
from bitskip_ref.config import ModelConfig
from bitskip_ref.constants import LARGEST_HALF, SCALE_FLOOR
from bitskip_train.exact import int8_attention, quantize
from bitskip_train.fast import FastOps, Prepared, Rotations

TensorTrace = Callable[[str, Tensor], None]
"""Receives (stage, values): the stages of `bitskip_ref.engine.Trace` with a leading batch axis."""

BYPASSES = ("none", "weights", "activations")

# Linear layers that share one input, and so one activation quantization and one product.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class Pass(NamedTuple):
    """What every block of one forward pass is given."""

    ops: FastOps
    bypass: str
    first: int  # position of the first token
    cos: Tensor  # f32 [T, E/2], rows of this pass's positions
    sin: Tensor
    rotations: Rotations
    peaks: list[Tensor] | None = None  # where `peak` of each quantized input is put


def peak(x: Tensor) -> Tensor:
    """How far the largest of a token's values stands out, on average: the square of that over the
    mean square, 1 or more, grows as the error of its codes does (SPEC 4.2). [..., n] -> scalar."""
    squares = x.float().square()
    return (squares.amax(-1) / squares.mean(-1).clamp_min(SCALE_FLOOR)).mean()


class Weight(nn.Module):
    """A matrix under a name of FORMAT 3, with the row or tensor scale of a loaded one.

    Full precision: `weight` f32 [out, in], `scale` None. Loaded from a folder: `weight` int8 codes
    and `scale` f32 [1] (ternary) or [out] (int8 rows). `bias` f32 [out], or None.
    """

    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, out_features: int, in_features: int, biased: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if biased else None)
        self.register_buffer("scale", None)


class Norm(nn.Module):
    """SPEC 3: RMS norm, or layer norm with a bias."""

    bias: nn.Parameter | None

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(width)) if kind == "layer" else None
        )
        self.eps = eps

    def forward(self, x: Tensor, ops: FastOps) -> Tensor:
        return ops.norm(x, self.weight, self.bias, self.eps)


class Gate(nn.Module):
    """SPEC 8.4: the routing gate after a block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, "layer", config.norm_eps)
        self.fc1 = Weight(config.gate_width, config.hidden_size)
        self.fc2 = Weight(1, config.gate_width)

    def forward(self, x: Tensor, ops: FastOps) -> Tensor:
        """Hidden states f32 [..., D] -> the sigmoid's argument, f32 [...]."""
        inner = ops.gate_product(self.norm(x, ops), self.fc1.weight)
        return ops.gate_product(torch.relu(inner), self.fc2.weight).squeeze(-1)


class Cache(CacheFill):
    """Keys (turned) and values of past positions (SPEC 6.4, 6.5, 6.8).

    `arrays`: what `cached_arrays` names, [L, 1, S, ...], S the context.
    """

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        super().__init__(config, kv_cache)
        places = config.num_hidden_layers, 1, config.max_position_embeddings
        self.arrays = {
            name: torch.from_numpy(np.zeros((*places, *shape), kind))
            for name, (kind, shape) in cached_arrays(config, kv_cache).items()
        }

    def write(self, layer: int, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Put f32 [1, T, K, E] of one block at position `first` and after it.

        Returns what the block holds up to there, f32 [1, S, ...] each, in the order of
        `cached_arrays`; codes as f32, too. `length` is advanced by the model, once all blocks have
        written.
        """
        new: tuple[Tensor, ...]
        if self.kv_cache == "int8":
            new = *quantize(keys, 8), *quantize(values, 8)
        elif self.kv_cache == "float16":  # rounded when it is stored
            new = keys.clamp(-LARGEST_HALF, LARGEST_HALF), values.clamp(-LARGEST_HALF, LARGEST_HALF)
        else:
            new = keys, values
        end = first + keys.shape[1]
        for kept, part in zip(self.arrays.values(), new, strict=True):
            kept[layer, :, first:end] = part
        return tuple(kept[layer, :, :end].float() for kept in self.arrays.values())

    def layer(self, i: int) -> tuple[np.ndarray, ...]:
        return tuple(kept[i, 0, : self.length].numpy() for kept in self.arrays.values())

    def _kept(self) -> Sequence[np.ndarray]:
        blocks, size = self._filled_part()
        return [part[:blocks, :, :size].numpy() for part in self.arrays.values()]


class FeedForward(nn.Module):
    """FFN with its norms and residual, before or after: a block's second half (SPEC 7), and all of
    an exit block (SPEC 8.8)."""

    ffn_norm: Norm
    ffn_sub_norm: Norm

    def __init__(
        self, config: ModelConfig, linears: dict[str, tuple[int, int]], norms: dict[str, int]
    ) -> None:
        """linears: name -> (out, in), norms: name -> width, as the config has them."""
        super().__init__()
        self.config = config
        for name, (out_features, in_features) in linears.items():
            biased = name in config.bias_shapes()
            self.add_module(name, Weight(out_features, in_features, biased))
        for name, width in norms.items():
            self.add_module(name, Norm(width, config.norm, config.norm_eps))
        self._kept: dict[str, Prepared] = {}

    # ---- linear layers --------------------------------------------------------------

    def linears(self, group: str) -> list[Weight]:
        """The group's layers that this configuration has, in file order."""
        return [getattr(self, name) for name in GROUPS[group] if hasattr(self, name)]

    def prepare(self, group: str, ops: FastOps) -> Prepared:
        """A group's quantized weights; those of a loaded model are kept from pass to pass."""
        if group in self._kept:
            return self._kept[group]
        layers = self.linears(group)
        ternary = self.config.linear == "ternary"
        made = ops.prepare([x.weight for x in layers], [x.scale for x in layers], ternary)
        if layers[0].scale is not None:
            self._kept[group] = made
        return made

    def linear(self, group: str, x: Tensor, run: Pass) -> Sequence[Tensor]:
        """One group's layers: [..., in] -> tensors [..., out_i] (SPEC 4.3 to 4.7, 5.1)."""
        config, ops, layers = self.config, run.ops, self.linears(group)
        weights = [layer.weight for layer in layers]
        if config.hadamard and ops.turns(group):
            turn = ops.rotate if config.linear == "ternary" else ops.rotate_unpadded
            x = turn(x, run.rotations)
        if config.linear == "float32" or run.bypass == "activations":
            y = ops.float_product(x, weights)
        else:
            if run.peaks is not None:
                run.peaks.append(peak(x))
            codes, step = ops.quantize(x, config.activation_bits)
            if run.bypass == "weights":
                y = ops.float_product(codes * step, weights)
            else:
                y = ops.ternary_product(codes, step, self.prepare(group, ops), weights)
        if config.relu2_in_linear:
            y = ops.relu2(y)
        parts = y.split([w.shape[0] for w in weights], -1)
        parts = [ops.finish(part, run.rotations) for part in parts]
        return [
            part if layer.bias is None else (part + layer.bias).to(part.dtype)
            for part, layer in zip(parts, layers, strict=True)
        ]

    # ---- forward --------------------------------------------------------------------

    def ffn(self, x: Tensor, run: Pass, trace: TensorTrace) -> Tensor:
        """SPEC 7.1: f32 [B, T, D] -> [B, T, D]."""
        config, ops = self.config, run.ops
        *gate, up = self.linear("up", x, run)
        if config.gated:
            up = (ops.silu if config.ffn == "swiglu" else ops.relu2)(gate[0]) * up
        elif not config.relu2_in_linear:
            up = ops.relu2(up)
        trace("act", up)
        if config.sub_norm:
            up = self.ffn_sub_norm(up, ops)
        return self.linear("down", up, run)[0]

    def feed_forward(self, x: Tensor, run: Pass, trace: TensorTrace) -> Tensor:
        """The FFN's half of SPEC 7.2, 7.3: f32 [B, T, D] -> f32 [B, T, D]."""
        pre = self.config.norm_position == "pre"
        x = x + self.ffn(self.ffn_norm(x, run.ops) if pre else x, run, trace)
        if not pre:
            x = self.ffn_norm(x, run.ops)
        trace("out", x)
        return x


class Block(FeedForward):
    """SPEC 7: attention and FFN with their norms and residuals, before or after."""

    attn_norm: Norm
    q_norm: Norm
    k_norm: Norm
    attn_sub_norm: Norm
    gate: Gate

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.linear_shapes(), config.norm_shapes())
        if config.gates:
            self.gate = Gate(config)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that `forward` uses: all but the gate's."""
        return [p for name, p in self.named_parameters() if not name.startswith("gate.")]

    def queries_keys_values(self, x: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """x f32 [B, T, D] -> turned queries [B, T, H, E], turned keys and values [B, T, K, E]."""
        if self.config.norm_position == "pre":
            x = self.attn_norm(x, run.ops)
        dim = (-1, self.config.head_dim)
        q, k, v = (part.unflatten(-1, dim) for part in self.linear("qkv", x, run))
        if self.config.qk_norm:
            q = self.q_norm(q, run.ops).to(q.dtype)
            k = self.k_norm(k, run.ops).to(k.dtype)
        return run.ops.rope(q, run.cos, run.sin), run.ops.rope(k, run.cos, run.sin), v

    def forward(
        self,
        x: Tensor,
        run: Pass,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
        trace: TensorTrace | None = None,
    ) -> Tensor:
        """SPEC 7.2, 7.3: f32 [B, T, D] -> f32 [B, T, D].

        `remember` stores new keys and values [B, T, K, E] and returns those of all positions, or
        their codes and steps (SPEC 6.8).
        """
        config, ops = self.config, run.ops
        report = trace or _ignore
        q, k, v = self.queries_keys_values(x, run)
        report("q", q)
        report("k", k)
        report("v", v)
        held = (k, v) if remember is None else remember(k, v)
        mixed = ops.attention(q, *held) if len(held) == 2 else int8_attention(q, *held)
        report("attn", mixed)
        if config.sub_norm:
            mixed = self.attn_sub_norm(mixed, ops)
        x = x + self.linear("o", mixed, run)[0]
        if config.norm_position == "post":
            x = self.attn_norm(x, ops)
        report("mid", x)
        return self.feed_forward(x, run, report)


def _ignore(stage: str, values: Tensor) -> None:
    """The trace of a pass that nobody looks at."""
