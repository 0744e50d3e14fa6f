"""RoPE and attention as ONNX nodes (SPEC section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitskip_export import onnx_ops as ops
from bitskip_export.onnx_builder import GraphBuilder, value_info
from bitskip_ref import constants
from bitskip_ref.config import ModelConfig
from bitskip_ref.rope import rope_table

f32 = np.float32


@dataclass(frozen=True)
class Positions:
    """What the blocks share. The positions tree (SPEC 2.3) is made of two of fixed depth: within
    chunks of about the square root of the context, then over the chunks' sums. So no loop is
    needed, and only the last chunk and the small second tree hold padding. There is room for more
    positions than the context, so that at least one zero of padding is always added: this is the
    final `+ 0.0` of SPEC 2.3 (Add(x, 0) itself would be removed by NoopElimination).
    """

    queries: str  # int64 [T], positions S..S+T-1
    keys: str  # int64 [N], positions 0..N-1, N = S + T padded to whole chunks
    ones: str  # f32 [N, K, 1]
    cos: str  # f32 [T, 1, E/2]
    sin: str
    chunk_levels: int  # 2^levels positions in a chunk
    top_levels: int  # 2^levels chunks
    pad_to_chunks: str  # Pad's amounts for the first axis: S + T -> N
    pad_to_top: str  # N / chunk -> 2^top_levels


def positions(g: GraphBuilder, config: ModelConfig) -> Positions:
    """From the lengths of the inputs `token_ids` and `past.0.key`."""
    levels = config.max_position_embeddings.bit_length()
    chunk_levels, top_levels = levels // 2, levels - levels // 2
    chunk, top = 1 << chunk_levels, 1 << top_levels

    zero, one, nothing = g.const(np.int64(0)), g.const(np.int64(1)), g.const(np.array([0]))
    past = g.op("Shape", "past.0.key", start=0, end=1)  # S as [1]
    total = g.op("Add", past, g.op("Shape", "token_ids"))  # S + T as [1]
    queries = g.op("Range", g.op("Squeeze", past), g.op("Squeeze", total), one)
    g.describe(queries, np.int64, ["T"])
    cos, sin = (
        g.op("Unsqueeze", g.op("Gather", g.weight(f"rope.{name}", table), queries), one)
        for name, table in zip(("cos", "sin"), rope_table(config), strict=True)
    )
    chunks = g.op("Add", total, g.const(np.array([chunk - 1])))
    chunks = g.op("Div", chunks, g.const(np.array([chunk])))
    padded = g.op("Mul", chunks, g.const(np.array([chunk])))
    keys = g.op("Range", zero, g.op("Squeeze", padded), one)
    g.describe(keys, np.int64, ["N"])
    tail = g.const(np.array([config.num_key_value_heads, 1]))
    ones = g.op("Expand", g.const(f32(1.0)), g.op("Concat", padded, tail, axis=0))
    g.describe(ones, f32, ["N", config.num_key_value_heads, 1])
    return Positions(
        queries,
        keys,
        ones,
        cos,
        sin,
        chunk_levels,
        top_levels,
        g.op("Concat", nothing, g.op("Sub", padded, total), axis=0),
        g.op("Concat", nothing, g.op("Sub", g.const(np.array([top])), chunks), axis=0),
    )


def rope(g: GraphBuilder, x: str, at: Positions, head_dim: int) -> str:
    """SPEC 6.1: x [T, heads, E] -> [T, heads, E]."""
    a, b = g.split(x, 2, [head_dim // 2] * 2)
    first = g.op("Sub", g.op("Mul", a, at.cos), g.op("Mul", b, at.sin))
    second = g.op("Add", g.op("Mul", b, at.cos), g.op("Mul", a, at.sin))
    return g.op("Concat", first, second, axis=2)


def attention(
    g: GraphBuilder, config: ModelConfig, at: Positions, q: str, keys: str, values: str,
    at_once: bool = False,
) -> str:  # fmt: skip
    """SPEC 6.2, 6.3: q [T, H, E], keys and values [S + T, K, E] -> [T, H * E].

    A Scan over tokens, so that one token's products with all keys and values are held at a time.
    at_once: without it, T times the memory; a runtime with dear loops is given few tokens a time.
    Inside, G = H / K heads share a key-value head.
    """
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv_heads

    # Laid out so that every tree cuts the first axis, or long runs of the last.
    q = g.reshape(q, 0, kv_heads, group, width)
    keys, values = (g.pad(x, 0, at.pad_to_chunks) for x in (keys, values))
    for x in (keys, values):
        g.describe(x, f32, ["N", kv_heads, width])
    padded = ops.power_of_two(width)
    q = ops.pad_features(g, q, width, padded, ("T", kv_heads, group))
    keys = ops.pad_features(g, keys, width, padded, ("N", kv_heads))
    keys = g.op("Transpose", keys, perm=[2, 1, 0])
    keys = g.reshape(keys, 0, 1, kv_heads, 1, -1)
    g.describe(keys, f32, [padded, 1, kv_heads, 1, "N"])
    # A column of ones beside the values, so that one tree sums numerator and denominator.
    values = g.op("Concat", values, at.ones, axis=2)
    values = g.op("Unsqueeze", values, g.const(np.array([2])))  # [N, K, 1, E + 1]

    def attend(b: GraphBuilder, query: str, position: str) -> str:
        """query [padded E, t, K, G, 1], position [t, 1, 1, 1] -> [t, H * E]."""
        scores = ops.leading_sum(b, b.op("Mul", query, keys), padded)
        scores = b.op("Squeeze", scores, b.const(np.array([0])))  # [t, K, G, N]
        scores = b.op("Mul", scores, b.const(f32(1.0 / math.sqrt(width))))
        e = exponentials(b, at, scores, position)
        e = b.op("Transpose", e, perm=[0, 3, 1, 2])
        e = b.op("Unsqueeze", e, b.const(np.array([4])))  # [t, N, K, G, 1]
        row = heads * (width + 1)
        total = ops.neighbour_sum(b, b.op("Mul", e, values), row, at.chunk_levels, "N")
        total = b.pad(total, 1, at.pad_to_top)  # [t, N / chunk, row], and zeros
        total = ops.neighbour_sum(b, total, row, at.top_levels, 1 << at.top_levels)
        weighted, whole = b.split(b.reshape(total, 0, heads, width + 1), 2, [width, 1])
        return b.reshape(b.op("Div", weighted, whole), 0, heads * width)

    position = g.reshape(at.queries, -1, 1, 1, 1)
    if at_once:
        query = g.op("Transpose", q, perm=[3, 0, 1, 2])
        return attend(g, g.op("Unsqueeze", query, g.const(np.array([4]))), position)
    q = g.op("Transpose", q, perm=[0, 3, 1, 2])
    b = g.child()
    inputs = {
        g.reshape(q, 0, padded, 1, kv_heads, group, 1): value_info(
            "query", f32, [padded, 1, kv_heads, group, 1]
        ),
        g.reshape(position, -1, 1, 1, 1, 1): value_info("position", np.int64, [1, 1, 1, 1]),
    }
    out = attend(b, "query", "position")
    return g.reshape(g.scan(b, inputs, value_info(out, f32, [1, heads * width])), -1, heads * width)


def exponentials(b: GraphBuilder, at: Positions, scores: str, position: str) -> str:
    """SPEC 6.3's e of scores [..., N] of tokens at `position`; 0 for the future, and padding."""
    hidden = b.op("Greater", at.keys, position)
    scores = b.op("Where", hidden, b.const(f32(-np.inf)), scores)
    largest = b.op("ReduceMax", scores, b.const(np.array([-1])), keepdims=1)
    return b.op("Where", hidden, b.const(f32(0.0)), ops.exp(b, b.op("Sub", scores, largest)))


def int8_attention(
    g: GraphBuilder, config: ModelConfig, at: Positions, q: str,
    keys: str, key_steps: str, values: str, value_steps: str,
) -> str:  # fmt: skip
    """SPEC 6.8: q f32 [T, H, E]; codes f32 [S + T, K, E], steps f32 [S + T, K, 1] -> [T, H * E].

    Integer sums by MatMul of floats: below 2^24 in f32, and below 2^53 in f64, they are exact in
    any order. By way of int64 a zero loses its sign.
    """
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    exact = f32 if 127 * 127 * width < 1 << 24 else np.float64
    codes, step = ops.quantize(g, q, 8)
    step = g.op("Mul", step, g.const(f32(1.0 / math.sqrt(width))))
    codes, step = (g.reshape(x, 0, kv_heads, heads // kv_heads, -1) for x in (codes, step))
    keys, key_steps, values, value_steps = (
        g.pad(x, 0, at.pad_to_chunks) for x in (keys, key_steps, values, value_steps)
    )
    for x, last in ((keys, width), (key_steps, 1), (values, width), (value_steps, 1)):
        g.describe(x, f32, ["N", kv_heads, last])
    keys = g.op("Transpose", g.cast(keys, exact), perm=[1, 2, 0])  # [K, E, N]
    values = g.op("Transpose", g.cast(values, np.float64), perm=[1, 0, 2])  # [K, N, E]
    key_steps, value_steps = (
        g.op("Transpose", x, perm=[1, 2, 0]) for x in (key_steps, value_steps)
    )  # [K, 1, N]

    b = g.child()
    last_axis = b.const(np.array([-1]))
    most, unit = (b.const(f32(n)) for n in (constants.LARGEST_WEIGHT, constants.SOFTMAX_UNIT))
    products = b.cast(b.op("MatMul", b.cast("query", exact), keys), f32)  # [K, G, N]
    e = exponentials(b, at, b.op("Mul", products, b.op("Mul", "step", key_steps)), "position")
    w = b.op("Mul", e, value_steps)
    top = b.op("ReduceMax", w, last_axis, keepdims=1)
    w = b.op("Round", b.op("Mul", w, b.op("Div", most, top)))
    sums = b.op("MatMul", b.cast(w, np.float64), values)  # [K, G, E]
    total = b.cast(b.op("Round", b.op("Mul", e, unit)), np.int64)
    total = b.op("ReduceSum", total, last_axis, keepdims=1)
    sums, total = b.cast(b.cast(sums, np.int64), f32), b.cast(total, f32)
    factor = b.op("Div", b.op("Div", top, most), b.op("Div", total, unit))
    out = b.reshape(b.op("Mul", sums, factor), heads * width)
    group = heads // kv_heads
    inputs = {
        codes: value_info("query", f32, [kv_heads, group, width]),
        step: value_info("step", f32, [kv_heads, group, 1]),
        at.queries: value_info("position", np.int64, []),
    }
    return g.scan(b, inputs, value_info(out, f32, [heads * width]))
