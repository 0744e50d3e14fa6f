"""The reference engine: one readable forward pass (SPEC section 7 and 8)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from bitskip_ref.arithmetic.attention import attention, int8_attention
from bitskip_ref.arithmetic.confidence import confidence
from bitskip_ref.arithmetic.ffn import ffn_activation
from bitskip_ref.arithmetic.functions import half, relu, relu2, sigmoid
from bitskip_ref.arithmetic.hadamard import rotate, rotate_unpadded
from bitskip_ref.arithmetic.norms import layer_norm, rms_norm
from bitskip_ref.arithmetic.quant import (
    float_linear,
    int8_linear,
    quantize_activations,
    ternary_linear,
)
from bitskip_ref.arithmetic.rope import apply_rope
from bitskip_ref.cache import ArrayCache
from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.engine import Engine, Trace
from bitskip_ref.floats import widened
from bitskip_ref.folder import read_folder
from bitskip_ref.packing import unpack_ternary
from bitskip_ref.rope import rope_table
from bitskip_ref.rows import Run
from bitskip_ref.tensors import linear_layers

f32 = np.float32


class KVCache(ArrayCache):
    """Keys (turned) and values per block [S, K, E]: f32, f16, or codes and steps (SPEC 6)."""

    def append(self, layer: int, position: int, k: np.ndarray, v: np.ndarray) -> None:
        """New keys and values f32 [T, K, E] at `position` and after it."""
        new: tuple[np.ndarray, ...]
        if self.kv_cache == "int8":
            new = *quantize_activations(k, 8), *quantize_activations(v, 8)
        elif self.kv_cache == "float16":
            new = half(k), half(v)
        else:
            new = k, v
        for kept, part in zip(self.arrays.values(), new, strict=True):
            kept[layer] = np.concatenate([kept[layer][:position], part])

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        """Turned queries f32 [T, H, E] of the last T positions -> f32 [T, H * E]."""
        held = [blocks[layer] for blocks in self.arrays.values()]
        if self.kv_cache == "int8":
            return int8_attention(q, *held)
        return attention(q, *(x.astype(f32) for x in held))


class ReferenceModel(Engine):
    """The engine in NumPy. Slow and plain: this is the definition."""

    cache_type = KVCache

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], kv_cache: str = "float32"
    ) -> None:
        """`tensors` as in a model folder (FORMAT 3); ternary weights are unpacked here.

        kv_cache: what new caches hold, one of KV_CACHES (SPEC 6.5, 6.8).
        """
        super().__init__(config, kv_cache)
        self.tensors = dict(tensors)
        if config.linear == "ternary":
            for name, (_, width) in linear_layers(config).items():
                key = f"{name}.weight"
                self.tensors[key] = unpack_ternary(tensors[key], width)
        self.cos, self.sin = rope_table(config)

    # ---- the forward pass, top to bottom --------------------------------------------

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [T] -> x [T, D] (SPEC 4.4, 5.4, 7.4)."""
        x = widened(self.tensors["embed_tokens.weight"][ids])
        if self.config.head_format in HEAD_BITS:
            x = x * self.tensors["embed_tokens.scale"][ids][:, None]
        x = rotate_unpadded(x) if self.config.rotated_head else x
        return self.norm("embedding_norm", x) if self.config.embedding_norm else x

    def block(
        self, i: int, x: np.ndarray, cache: KVCache, position: int, trace: Trace = lambda *_: None
    ) -> np.ndarray:
        """Block i (from 0) on the tokens from `position` on: x [T, D] -> [T, D] (SPEC 7)."""
        c, at = self.config, f"layers.{i}"
        pre = c.norm_position == "pre"

        a = self.norm(f"{at}.attn_norm", x) if pre else x
        q = self.queries(i, a, position)
        k, v = self.keys_values(i, a, position)
        cache.append(i, position, k, v)
        for name, value in (("q", q), ("k", k), ("v", v)):
            trace(f"{at}.{name}", value)
        a = cache.attend(i, q)  # [T, H * E]
        trace(f"{at}.attn", a)
        if c.sub_norm:
            a = self.norm(f"{at}.attn_sub_norm", a)
        x = x + self.linear(f"{at}.o_proj", a)
        if not pre:
            x = self.norm(f"{at}.attn_norm", x)
        trace(f"{at}.mid", x)

        return self.feed_forward(at, x, trace)

    def feed_forward(self, at: str, x: np.ndarray, trace: Trace) -> np.ndarray:
        """FFN, norms and residual of a block or an exit block: x [T, D] -> [T, D] (SPEC 7, 8.8)."""
        c, pre = self.config, self.config.norm_position == "pre"
        f = self.norm(f"{at}.ffn_norm", x) if pre else x
        gate = self.linear(f"{at}.gate_proj", f) if c.gated else None
        f = ffn_activation(c, self.linear(f"{at}.up_proj", f), gate)  # [T, F]
        trace(f"{at}.act", f)
        if c.sub_norm:
            f = self.norm(f"{at}.ffn_sub_norm", f)
        x = x + self.linear(f"{at}.down_proj", f)
        if not pre:
            x = self.norm(f"{at}.ffn_norm", x)
        trace(f"{at}.out", x)
        return x

    def exit(self, x: np.ndarray, n: int, trace: Trace = lambda *_: None) -> np.ndarray:
        """Logits after n blocks: x [T, D] -> [T, V] (SPEC 8.1, 8.8)."""
        norm, head = self.config.exit_names(n)
        if n in self.config.exit_blocks:
            x = self.feed_forward(f"exits.{n}.block", x, trace)
        x = self.norm(norm, x)
        trace("exit_norm", x)
        z = self.head(head, x)
        trace("logits", z)
        return z

    # ---- its parts ------------------------------------------------------------------

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """The configured norm, or a layer norm where there is a bias (SPEC 3)."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if bias is None:
            return rms_norm(x, weight, self.config.norm_eps)
        return layer_norm(x, weight, bias, self.config.norm_eps)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """A linear layer and its bias, if there is one (SPEC 4.7)."""
        y, bias = self.product(name, x), self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def product(self, name: str, x: np.ndarray) -> np.ndarray:
        """BitLinear, H-BitLinear, int8 rows or float32 (SPEC 4.3, 5.1, 4.8, 5.3, 4.5, 4.6)."""
        weight, ternary = self.tensors[f"{name}.weight"], self.config.linear == "ternary"
        if self.config.linear == "float32":
            return float_linear(x, weight)
        if self.config.hadamard:
            x = rotate(x) if ternary else rotate_unpadded(x)
        scale = self.tensors[f"{name}.scale"]
        if ternary:
            y = ternary_linear(x, weight, scale[0], self.config.activation_bits)
        else:
            y = int8_linear(x, weight, scale)
        return relu2(y) if self.config.relu2_in_linear else y

    def head(self, name: str, x: np.ndarray) -> np.ndarray:
        """An exit's head: integer rows or float (SPEC 4.4, 5.4, 4.5)."""
        weight = self.tensors[f"{name}.weight"]
        x = rotate_unpadded(x) if self.config.rotated_head else x
        if self.config.head_format in HEAD_BITS:
            return int8_linear(x, weight, self.tensors[f"{name}.scale"])
        return float_linear(x, weight)

    def queries(self, i: int, a: np.ndarray, position: int) -> np.ndarray:
        """Turned queries of block i: a [T, D] -> [T, H, E]."""
        q = self.linear(f"layers.{i}.q_proj", a).reshape(len(a), -1, self.config.head_dim)
        return self.turn(f"layers.{i}.q_norm", q, position)

    def keys_values(self, i: int, a: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Turned keys, and values, of block i: a [T, D] -> two of [T, K, E]."""
        k = self.linear(f"layers.{i}.k_proj", a).reshape(len(a), -1, self.config.head_dim)
        v = self.linear(f"layers.{i}.v_proj", a).reshape(len(a), -1, self.config.head_dim)
        return self.turn(f"layers.{i}.k_norm", k, position), v

    def turn(self, norm: str, x: np.ndarray, position: int) -> np.ndarray:
        """The norm, if there is one, and RoPE for tokens from `position` on (SPEC 6.7, 6.1)."""
        x = self.norm(norm, x) if self.config.qk_norm else x
        rows = slice(position, position + len(x))
        return apply_rope(x, self.cos[rows], self.sin[rows])

    # ---- an engine's primitives ------------------------------------------------------

    def _embed(self, run: Run, trace: Trace | None = None) -> np.ndarray:
        x = self.embed(np.asarray(run.ids))
        if trace is not None:
            trace("embed", x)
        return x

    def _blocks(
        self, x: np.ndarray, run: Run, first: int, last: int, trace: Trace | None = None
    ) -> np.ndarray:
        for i in range(first, last):
            x = self.block(i, x, run.cache, run.first, trace or (lambda *_: None))
        return x

    def _fill(self, x: np.ndarray, run: Run, first: int, last: int) -> None:
        for i in range(first, last):
            pre = self.config.norm_position == "pre"
            a = self.norm(f"layers.{i}.attn_norm", x) if pre else x
            run.cache.append(i, run.first, *self.keys_values(i, a, run.first))

    def _exit(
        self, x: np.ndarray, n: int, first: int = 0, trace: Trace | None = None
    ) -> np.ndarray:
        return self.exit(x[first:], n, trace or (lambda *_: None))

    def _gate(self, x: np.ndarray, n: int) -> np.float32:
        t, at = self.tensors, f"layers.{n - 1}.gate"
        rows = [quantize_activations(t[f"{at}.{fc}.weight"], 8) for fc in ("fc1", "fc2")]
        (codes1, steps1), (codes2, steps2) = rows
        inner = relu(int8_linear(self.norm(f"{at}.norm", x), codes1, steps1[:, 0]))
        return sigmoid(int8_linear(inner, codes2, steps2[:, 0]))[0, 0]

    def _confidence(self, z: np.ndarray, measure: str) -> np.float32:
        return confidence(z)[measure]

    def _join(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(rows)


def load(path: str | os.PathLike[str], kv_cache: str = "float32") -> ReferenceModel:
    """Load a model folder. Raises bitskip_ref.FormatError if it is not a whole one."""
    folder = read_folder(path)
    return ReferenceModel(folder.config, folder.tensors, kv_cache)
