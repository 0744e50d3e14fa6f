"""A model as an ONNX graph, one for each exit layer; reads as `bitskip_ref.model` does.

Inputs: token_ids int64 [T]; past.{i}.key and past.{i}.value [S, K, E] of each block, S >= 0.
Outputs: logits f32 [T, V]; present.{i}.key and present.{i}.value [S + T, K, E]. Keys and values are
f32, f16 (SPEC 6.5), or int8 with past.{i}.key_step and the like, f32 [S, K, 1] (SPEC 6.8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from bitskip_export import onnx_ops as ops
from bitskip_export.onnx_attention import attention, int8_attention, positions, rope
from bitskip_export.onnx_builder import Dim, GraphBuilder, value_info
from bitskip_ref.cache import cached_arrays, check_kv_cache
from bitskip_ref.checks import check_exit_layer
from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.packing import unpack_ternary

f32 = np.float32
LARGEST_FILE = 2_000_000_000  # protobuf cannot hold 2 GiB

# Keys of the file's metadata.
EXIT_KEY, ARITHMETIC_KEY, CONFIG_KEY, CACHE_KEY = (
    f"bitskip.{k}" for k in ("exit", "arithmetic", "config", "kv_cache")
)


def build_graph(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    exit_layer: int | None = None,
    *,
    trace: bool = False,
) -> onnx.ModelProto:
    """The graph of one exit with its weights inside; `tensors` as in a model folder (FORMAT 3).

    With `trace`, the stages of `bitskip_ref.engine.Trace` are outputs too, under their names.
    Raises ValueError for an exit out of range, and for more weights than one file can hold.
    """
    graph = ExitGraph(config, tensors, exit_layer, trace)
    size = sum(weight.data.size for weight in graph.g.weights.values())
    if size > LARGEST_FILE:
        raise ValueError(
            f"{size / 1e9:.1f} GB of weights exceed the 2 GB of one ONNX file: "
            "use write_onnx, which puts them beside it"
        )
    return graph.model()


def cache_name(when: str, i: int, array: str) -> str:
    """The input (`past`) or output (`present`) that is one of block i's `cached_arrays`."""
    return f"{when}.{i}.{array.removesuffix('s')}"


class ExitGraph:
    """Builds the graph of one exit. `g.weights` are the weights it uses."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, np.ndarray],
        exit_layer: int | None = None,
        trace: bool = False,
        kv_cache: str = "float32",
        at_once: bool = False,
    ) -> None:
        """at_once: attention without a loop over tokens (`onnx_attention.attention`)."""
        self.config, self.tensors, self.trace = config, tensors, trace
        self.at_once = at_once
        self.kv_cache = check_kv_cache(kv_cache, config)
        self.exit_layer = check_exit_layer(exit_layer, config)
        self.g = GraphBuilder()
        self.inputs = [value_info("token_ids", np.int64, ["T"])]
        self.outputs = [value_info("logits", f32, ["T", config.vocab_size])]
        self.stages: list[onnx.ValueInfoProto] = []

        with self.g.scope("positions"):
            self.at = positions(self.g, config)
        with self.g.scope("embed"):
            x = self.embed()
        for i in range(self.exit_layer):
            with self.g.scope(f"layers.{i}"):
                x = self.block(i, x)
        with self.g.scope("exit"):
            self.exit(x)

    def model(self, external: tuple[str, Mapping[str, int]] | None = None) -> onnx.ModelProto:
        """The finished model; `external` as in `GraphBuilder.model`."""
        metadata = {
            EXIT_KEY: str(self.exit_layer),
            ARITHMETIC_KEY: "tolerance" if self.config.linear == "float32" else "exact",
            CONFIG_KEY: json.dumps(self.config.to_dict()),
            CACHE_KEY: self.kv_cache,
        }
        outputs = self.outputs + self.stages
        return self.g.model("bitskip", self.inputs, outputs, metadata, external)

    # ---- the forward pass, top to bottom --------------------------------------------

    def embed(self) -> str:
        """token_ids -> x [T, D] (SPEC 4.4, 7.4). A tied embedding reads columns of the head.

        ONNX counts negative ids from the end; here they become V, which Gather refuses.
        """
        g, c = self.g, self.config
        negative = g.op("Less", "token_ids", g.const(np.int64(0)))
        ids = g.op("Where", negative, g.const(np.int64(c.vocab_size)), "token_ids")
        if c.tie_word_embeddings:
            x = g.op("Gather", self.head_weight("embed_tokens"), ids, axis=1)
            x = g.op("Transpose", x, perm=[1, 0])
        else:
            name = "embed_tokens.weight"
            x = g.op("Gather", g.weight(name, self.tensors[name]), ids)
        x = g.cast(x, f32)
        if c.head_format in HEAD_BITS:
            scale = g.op("Gather", self.head_scale("embed_tokens"), ids)
            x = g.op("Mul", x, g.op("Unsqueeze", scale, g.const(np.int64(1))))
            x = ops.rotate_unpadded(g, x, c.hidden_size) if c.rotated_head else x
        x = self.norm("embedding_norm", x) if c.embedding_norm else x
        self.report("embed", x, c.hidden_size)
        return x

    def block(self, i: int, x: str) -> str:
        """Block i (from 0): x [T, D] -> [T, D] (SPEC 7)."""
        g, c, at = self.g, self.config, f"layers.{i}"
        pre = c.norm_position == "pre"

        a = self.norm(f"{at}.attn_norm", x) if pre else x
        q, k, v = self.linears([f"{at}.{n}_proj" for n in "qkv"], a, c.hidden_size)
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        q, k, v = (g.reshape(y, 0, n, c.head_dim) for y, n in zip((q, k, v), heads, strict=True))
        if c.qk_norm:
            q = self.norm(f"{at}.q_norm", q, ("T", c.num_attention_heads))
            k = self.norm(f"{at}.k_norm", k, ("T", c.num_key_value_heads))
        q, k = (rope(g, y, self.at, c.head_dim) for y in (q, k))
        self.report(f"{at}.q", q, c.num_attention_heads, c.head_dim)
        self.report(f"{at}.k", k, c.num_key_value_heads, c.head_dim)
        self.report(f"{at}.v", v, c.num_key_value_heads, c.head_dim)
        held = self.cached(i, k, v)
        if self.kv_cache == "int8":
            a = int8_attention(g, c, self.at, q, *held)  # [T, H * E]
        else:
            keys, values = held
            a = attention(g, c, self.at, q, keys, values, self.at_once)
        self.report(f"{at}.attn", a, c.attention_size)
        if c.sub_norm:
            a = self.norm(f"{at}.attn_sub_norm", a)
        x = g.op("Add", x, *self.linears([f"{at}.o_proj"], a, c.attention_size))
        if not pre:
            x = self.norm(f"{at}.attn_norm", x)
        self.report(f"{at}.mid", x, c.hidden_size)
        return self.feed_forward(at, x)

    def feed_forward(self, at: str, x: str) -> str:
        """FFN, norms and residual of a block or an exit block: x [T, D] -> [T, D] (SPEC 7, 8.8)."""
        g, c, pre = self.g, self.config, self.config.norm_position == "pre"
        f = self.norm(f"{at}.ffn_norm", x) if pre else x
        names = ["up_proj", "gate_proj"] if c.gated else ["up_proj"]
        f = self.activation(*self.linears([f"{at}.{n}" for n in names], f, c.hidden_size))  # [T, F]
        self.report(f"{at}.act", f, c.intermediate_size)
        if c.sub_norm:
            f = self.norm(f"{at}.ffn_sub_norm", f)
        x = g.op("Add", x, *self.linears([f"{at}.down_proj"], f, c.intermediate_size))
        if not pre:
            x = self.norm(f"{at}.ffn_norm", x)
        self.report(f"{at}.out", x, c.hidden_size)
        return x

    def exit(self, x: str) -> None:
        """Logits of x [T, D] (SPEC 8.1, 8.8)."""
        norm, head = self.config.exit_names(self.exit_layer)
        if self.exit_layer in self.config.exit_blocks:
            x = self.feed_forward(f"exits.{self.exit_layer}.block", x)
        x = self.norm(norm, x)
        self.report("exit_norm", x, self.config.hidden_size)
        self.g.op("Identity", self.head(head, x), name="logits")

    # ---- its parts ------------------------------------------------------------------

    def norm(self, name: str, x: str, lead: Sequence[Dim] = ("T",)) -> str:
        """The configured norm of x [*lead, n] (SPEC 3)."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return ops.norm(self.g, x, weight, bias, self.config.norm_eps, lead)

    def linears(self, names: list[str], x: str, width: int) -> list[str]:
        """Linear layers that share their input [T, width], with their biases (SPEC 4.7)."""
        biases = [self.tensors.get(f"{name}.bias") for name in names]
        return [
            y if bias is None else self.g.op("Add", y, self.g.const(bias))
            for y, bias in zip(self.products(names, x, width), biases, strict=True)
        ]

    def products(self, names: list[str], x: str, width: int) -> list[str]:
        """Those layers without their biases (SPEC 4.3, 4.5, 4.6, 4.8, 5)."""
        g, c = self.g, self.config
        if c.linear == "float32":
            return [
                g.op("MatMul", x, g.weight(key, self.tensors[key].T))
                for key in (f"{name}.weight" for name in names)
            ]
        ternary, outputs = c.linear == "ternary", []
        if c.hadamard:
            x = (ops.rotate if ternary else ops.rotate_unpadded)(g, x, width)
        quantized = ops.quantize(g, x, c.activation_bits)
        for name in names:
            if not ternary:
                weight = g.weight(f"{name}.weight", self.tensors[f"{name}.weight"].T)
                scale = g.weight(f"{name}.scale", self.tensors[f"{name}.scale"])
                y = ops.int8_linear(g, quantized, weight, scale)
                outputs.append(ops.relu2(g, y) if c.relu2_in_linear else y)
                continue
            codes = unpack_ternary(self.tensors[f"{name}.weight"], c.padded(width))
            alpha = self.tensors[f"{name}.scale"]
            y = ops.ternary_linear(g, name, quantized, codes, alpha)
            outputs.append(ops.relu2(g, y) if c.relu2_in_linear else y)
        return outputs

    def activation(self, up: str, gate: str | None = None) -> str:
        """What enters the down projection, [T, F] (SPEC 7.1)."""
        if gate is not None:
            function = ops.silu if self.config.ffn == "swiglu" else ops.relu2
            return self.g.op("Mul", function(self.g, gate), up)
        return up if self.config.relu2_in_linear else ops.relu2(self.g, up)

    def head(self, name: str, x: str) -> str:
        """x [T, D] -> logits [T, V] (SPEC 4.4, 4.5)."""
        weight = self.head_weight(name)
        if self.config.head_format in HEAD_BITS:
            if self.config.rotated_head:
                x = ops.rotate_unpadded(self.g, x, self.config.hidden_size)
            codes = ops.quantize(self.g, x, 8)
            return ops.int8_linear(self.g, codes, weight, self.head_scale(name))
        shape = (self.config.hidden_size, self.config.vocab_size)
        return ops.float_linear(self.g, x, self.g.cast(weight, f32), shape)

    def head_weight(self, name: str) -> str:
        """Codes or floats of a head, [D, V]."""
        return self.g.weight(f"{name}.weight", self.tensors[f"{name}.weight"].T)

    def head_scale(self, name: str) -> str:
        return self.g.weight(f"{name}.scale", self.tensors[f"{name}.scale"])

    def cached(self, i: int, k: str, v: str) -> list[str]:
        """What block i's cache holds once k, v [T, K, E] are in it, as f32 (SPEC 6.4, 6.5, 6.8).

        It has an input `past` and an output `present` for each of `cached_arrays`.
        """
        g = self.g
        if self.kv_cache == "int8":
            new = [*ops.quantize(g, k, 8), *ops.quantize(g, v, 8)]
        elif self.kv_cache == "float16":
            new = [ops.half(g, k), ops.half(g, v)]
        else:
            new = [k, v]
        held = []
        arrays = cached_arrays(self.config, self.kv_cache).items()
        for (name, (kind, shape)), x in zip(arrays, new, strict=True):
            past, present = (cache_name(when, i, name) for when in ("past", "present"))
            self.inputs.append(value_info(past, kind, ["S", *shape]))
            self.outputs.append(value_info(present, kind, ["S+T", *shape]))
            if kind is np.int8:
                x = g.cast(x, kind)
            x = g.op("Concat", past, x, axis=0, name=present)
            held.append(x if kind is f32 else g.cast(x, f32))
        return held

    def report(self, stage: str, x: str, *shape: int) -> None:
        """Make x [T, *shape] an output of a tracing graph."""
        if self.trace:
            self.g.op("Identity", x, name=stage)
            self.stages.append(value_info(stage, f32, ["T", *shape]))
