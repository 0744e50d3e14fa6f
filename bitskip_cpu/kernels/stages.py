"""The stages of a block, in the order in which `forward.block` runs them.

A stage is cut into parts that threads may share: one token, key-value head or band of rows each. A
part owns what it writes: floats are never added across parts, so that neither the number of threads
nor the order in which they take parts can change a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitskip_cpu.kernels.arithmetic.elementwise import (
    LARGEST_INT8,
    copy,
    ffn_activation,
    fill_zero,
    fwht,
    layer_norm,
    quantize,
    rms_norm,
    rotate_unpadded,
)
from bitskip_cpu.kernels.attention.attend import (
    over_float16,
    over_float32,
    rope,
    store_key,
    store_value,
)
from bitskip_cpu.kernels.attention.int8 import over_int8, store_key_codes, store_value_codes
from bitskip_cpu.kernels.contenders import (
    bound_rows,
    count_found,
    find_least,
    norms_of_codes,
    settle_rows,
)
from bitskip_cpu.kernels.layout import (
    BOUND,
    CACHED_FLOAT16,
    CACHED_FLOAT32,
    CACHED_INT8,
    DOWN,
    FLOAT32,
    FLOAT_ROWS,
    FOUND,
    INT8_ROWS,
    LANES,
    LEAST,
    NORMS,
    OUT,
    QKV,
    QUERIES,
    TERNARY,
    UP,
    VOCAB,
)
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.pieces import piece
from bitskip_cpu.kernels.numba_inside.views import cache_structs, floats, int32s, int64s
from bitskip_cpu.kernels.products.rows import (
    IN_HALVES,
    apart_from,
    int8_rows,
    linear_floats,
    order,
    ternary_rows,
    vocab_codes,
    vocab_floats,
)

Kernel = Callable[..., Any]

ATTENTION_IN, ROWS, STORE, ATTEND, OUT_IN, FFN_IN, DOWN_IN, BLOCK_OUT, EXIT_IN = range(9)


@kernel
def run_part(s, products, thread, part):
    """Run one part of the stage at hand."""
    scratch = s.scratch + thread * s.scratch_stride
    stage = s.stage
    if stage == ROWS:
        rows(s, products, scratch, part)
    elif stage == ATTEND:
        attend_part(s, scratch, part)
    elif stage == STORE:
        store(s, scratch, part)
    elif stage == ATTENTION_IN:
        attention_in(s, products, scratch, part)
    elif stage == OUT_IN:
        out_in(s, products, scratch, part)
    elif stage == FFN_IN:
        ffn_in(s, products, scratch, part)
    elif stage == DOWN_IN:
        down_in(s, products, scratch, part)
    elif stage == BLOCK_OUT:
        block_out(s, scratch, part)
    else:
        exit_in(s, scratch, part)


# ---- a block's stages, token t each but for ATTEND and ROWS --------------------------


@kernel
def attention_in(s, products, scratch, t):
    """x -> input of q, k, v: its norm, in a pre-norm block (SPEC 7.2)."""
    x, input_at = s.x + t * 4 * s.hidden, s.input + t * s.input_stride
    if s.post_norm:
        copy(x, input_at, s.hidden)
    else:
        norm(s, x, params(s) + s.attn_norm, input_at, s.hidden, scratch)
    feed(s, products[QKV], scratch, t)


@kernel
def store(s, scratch, t):
    """Norm and turn the keys; keys and values into the cache (SPEC 6.7, 6.1, 6.4, 6.5, 6.8)."""
    cache, position, size = cache_of(s, t), int64s(s.positions, s.tokens)[t], 4 * s.head_dim
    turned = position * 2 * s.head_dim  # bytes: a position has E / 2 cosines
    number, lane = position // LANES, position % LANES
    page = int64s(cache.table, number + 1)[number]
    key = s.qkv + t * 4 * (s.attention + 2 * s.kv) + 4 * s.attention
    value = key + 4 * s.kv
    for h in range(s.kv_heads):
        if s.qk_norm:
            head = key + h * size
            norm(s, head, params(s) + s.k_norm, head, s.head_dim, scratch)
        rope(key + h * size, s.cos + turned, s.sin + turned, s.head_dim)
        at = page + part_of(s, cache, h)
        if cache.number_bytes == CACHED_INT8:
            store_key_codes(key + h * size, at, s.head_dim, lane, scratch)
            store_value_codes(value + h * size, at + cache.values, s.head_dim, s.value_width, lane,
                              scratch)  # fmt: skip
            continue
        store_key(key + h * size, at, cache.number_bytes, s.head_padded, s.head_dim, s.key_slots,
                  lane)  # fmt: skip
        store_value(value + h * size, at + cache.values, cache.number_bytes, s.value_width,
                    s.head_dim, lane)  # fmt: skip


@kernel
def attend_part(s, scratch, part):
    """Norm, turn and run a token's query heads that share a key-value head (SPEC 6.1 to 6.8)."""
    kv_head, t = part // s.tokens, part % s.tokens  # a head's keys stay at hand
    turned = int64s(s.positions, s.tokens)[t] * 2 * s.head_dim
    size, sharing = 4 * s.head_dim, s.heads // s.kv_heads
    q_at = s.qkv + t * 4 * (s.attention + 2 * s.kv)
    for i in range(kv_head * sharing, (kv_head + 1) * sharing):
        if s.qk_norm:
            head = q_at + i * size
            norm(s, head, params(s) + s.q_norm, head, s.head_dim, scratch)
        rope(q_at + i * size, s.cos + turned, s.sin + turned, s.head_dim)
    cache = cache_of(s, t)
    if cache.number_bytes == CACHED_FLOAT32:
        attend_float32(cache.attend, s, scratch, part)
    elif cache.number_bytes == CACHED_FLOAT16:
        attend_float16(cache.attend, s, scratch, part)
    else:
        attend_int8(cache.attend, s, scratch, part)


def attending(over: Kernel) -> Kernel:
    """A part of ATTEND over a cache of one kind, by a kernel (`attention.attend`) for it."""

    def attend(s, scratch, part):
        kv_head, t = part // s.tokens, part % s.tokens
        cache, position = cache_of(s, t), int64s(s.positions, s.tokens)[t]
        size, sharing = 4 * s.head_dim, s.heads // s.kv_heads
        h, end = kv_head * sharing, (kv_head + 1) * sharing
        keys = part_of(s, cache, kv_head)
        caches = int64s(s.caches, s.tokens)
        cold = t == 0 or caches[t] != caches[t - 1]
        # What is read after this: the next token's keys, or those of the next head, of this block
        # or the next one, of the first token.
        soon, soon_keys = (t + 1, keys) if t + 1 < s.tokens else (0, keys + cache.head_bytes)
        later = cache_of(s, soon)
        soon_count = 0
        if soon == 0 or caches[soon] != caches[t]:
            soon_count = int64s(s.positions, s.tokens)[soon] // LANES + 1
        q_at, out_at = s.qkv + t * 4 * (s.attention + 2 * s.kv), s.attended + t * 4 * s.attention
        while h < end:
            queries = min(QUERIES, end - h)
            over(queries, q_at + h * size, cache.table, keys, keys + cache.values, s.head_padded,
                 s.head_dim, s.key_slots, s.value_width, position + 1, cold, later.table,
                 soon_count if h + queries == end else 0, soon_keys, out_at + h * size,
                 scratch)  # fmt: skip
            h += queries

    return attend


attend_float32 = piece(attending(over_float32), "attend_float32")
attend_float16 = piece(attending(over_float16), "attend_float16")
attend_int8 = piece(attending(over_int8), "attend_int8")


@kernel
def out_in(s, products, scratch, t):
    """Attention's result -> input of o: its sub-norm, if there is one (SPEC 7.1)."""
    attended, input_at = s.attended + t * 4 * s.attention, s.input + t * s.input_stride
    sub_norm(s, attended, s.attn_sub_norm, input_at, s.attention, scratch)
    feed(s, products[OUT], scratch, t)


@kernel
def ffn_in(s, products, scratch, t):
    """x + o -> mid; its norm -> input of gate, up and, post-norm, mid itself (SPEC 7.2, 7.3).

    An exit block has no attention: there mid is given (SPEC 8.8).
    """
    at, input_at = t * 4 * s.hidden, s.input + t * s.input_stride
    mid = s.mid + at
    if s.layer < s.layers:
        residual(s.x + at, s.y + at, mid, s.hidden)
        if s.post_norm:
            norm(s, mid, params(s) + s.attn_norm, mid, s.hidden, scratch)
    if s.post_norm:
        copy(mid, input_at, s.hidden)
    else:
        norm(s, mid, params(s) + s.ffn_norm, input_at, s.hidden, scratch)
    feed(s, products[UP], scratch, t)


@kernel
def down_in(s, products, scratch, t):
    """gate, up -> act, and its sub-norm, if there is one -> input of down (SPEC 7.1)."""
    act, input_at = s.act + t * 4 * s.ffn, s.input + t * s.input_stride
    ffn_activation(s.ffn_kind, s.squared, s.up + t * products[UP].out_stride, act, s.ffn)
    sub_norm(s, act, s.ffn_sub_norm, input_at, s.ffn, scratch)
    feed(s, products[DOWN], scratch, t)


@kernel
def block_out(s, scratch, t):
    """mid + down -> x; its norm, in a post-norm block (SPEC 7.2, 7.3)."""
    at = t * 4 * s.hidden
    x = s.x + at
    residual(s.mid + at, s.y + at, x, s.hidden)
    if s.post_norm:
        norm(s, x, params(s) + s.ffn_norm, x, s.hidden, scratch)


@kernel
def exit_in(s, scratch, t):
    """x -> final norm, its codes if needed (SPEC 8.1, 5.4, 4.4)."""
    input_at = s.input + t * s.input_stride
    norm(s, s.x + t * 4 * s.hidden, s.final_norm, input_at, s.hidden, scratch)
    if s.vocab_kind >= FLOAT32:
        order(input_at, s.hidden, s.codes + t * s.codes_stride)
        return
    if s.head_odd:  # elsewhere: the norm's result is a stage
        turned_at = s.y + t * 4 * s.hidden
        copy(input_at, turned_at, s.hidden)
        rotate_unpadded(turned_at, s.hidden, s.head_odd, s.head_table, scratch)
        input_at = turned_at
    make_codes(s, input_at, t, s.hidden, LARGEST_INT8, (s.hidden + 63) // 64 * 64)


@kernel
def rows(s, products, scratch, part):
    """Input -> some rows of a product, for all tokens (SPEC 4.3 to 4.8)."""
    if s.product > VOCAB:
        contend(s.contend, s, scratch, part)
    elif s.product == VOCAB:  # with which products[0] has nothing to do
        if s.vocab_kind < FLOAT32:
            code_rows(s.vocab_rows, s, products[0], scratch, part)
        else:
            float_rows(s.vocab_rows, s, products[0], scratch, part)
    elif s.linear_kind == TERNARY:
        packed_rows(s.linear_rows, s, products[s.product], scratch, part)
    elif s.linear_kind == INT8_ROWS:
        code_rows(s.linear_rows, s, products[s.product], scratch, part)
    else:
        float_rows(s.linear_rows, s, products[s.product], scratch, part)


@piece
def packed_rows(s, p, scratch, part):
    """Rows of a product of ternary weights (SPEC 4.3)."""
    first, last = bounds(s, part)
    ternary_rows(s, p, first, last, scratch + s.acc, scratch + s.unpacked)
    add_bias(s, p, first, last)


@piece
def code_rows(s, p, scratch, part):
    """Rows of int8 weights, or of a vocabulary of 8, 6 or 4 bits (SPEC 4.4, 4.8)."""
    first, last = bounds(s, part)
    if s.product == VOCAB:
        vocab_codes(s, first, last, scratch + s.acc)
    else:
        int8_rows(s, p, first, last, scratch + s.acc)
        add_bias(s, p, first, last)


@piece
def float_rows(s, p, scratch, part):
    """Rows of float32 weights, or of a vocabulary of floats (SPEC 4.5)."""
    first, last = bounds(s, part)
    if s.product == VOCAB:
        vocab_floats(s, first, last, scratch, scratch + s.unpacked)
    else:
        linear_floats(s, p, first, last, scratch, scratch + s.unpacked)
        add_bias(s, p, first, last)


@piece
def contend(s, scratch, part):
    """Rows of a head's two parts, or what lies between them: NORMS, LEAST, FOUND (SPEC 9.6)."""
    if part == NORMS:
        norms_of_codes(s)
    elif part == LEAST:
        find_least(s)
    elif part == FOUND:
        s.contenders_found = count_found(s)
    else:
        first, last = bounds(s, part)
        if s.product == BOUND:
            bound_rows(s, first, last, scratch + s.acc)
        else:
            settle_rows(s, first, last, scratch)


@kernel
def bounds(s, part):
    """The first row of a part of a product, and that behind its last."""
    first = s.first_row + part * s.part_rows
    return first, min(first + s.part_rows, s.last_row)


@kernel
def add_bias(s, p, first, last):
    """A product's bias, if there is one, to a part's rows, for all tokens (SPEC 4.7)."""
    if p.bias:
        bias_rows(s, p, first, last)
        if IN_HALVES and s.apart:
            other, other_last = apart_from(s, first, last)
            bias_rows(s, p, other, other_last)


@kernel
def bias_rows(s, p, first, last):
    """A product's bias to rows first..last-1, for all tokens."""
    for t in range(s.tokens):
        out = p.out + t * p.out_stride + 4 * first
        residual(out, params(s) + p.bias + 4 * first, out, last - first)


# ---- what they have in common --------------------------------------------------------


@kernel
def params(s):
    """Where the block's weight scales and norms are."""
    return s.params + s.layer * s.params_stride


@kernel
def norm(s, x, weight, y, n, scratch):
    """The configured norm (SPEC 3)."""
    if s.layer_norm:
        layer_norm(x, weight, y, n, s.norm_eps, scratch)
    else:
        rms_norm(x, weight, y, n, s.norm_eps, scratch)


@kernel
def sub_norm(s, x, weight, y, n, scratch):
    """The norm with the block's weight at that offset, in models with one; else x (SPEC 7.1)."""
    if s.sub_norm:
        norm(s, x, params(s) + weight, y, n, scratch)
    else:
        copy(x, y, n)


@kernel
def residual(x_at, y_at, out_at, n):
    """out = x + y."""
    x, y, out = floats(x_at, n), floats(y_at, n), floats(out_at, n)
    for i in range(n):
        out[i] = x[i] + y[i]


@kernel
def feed(s, p, scratch, t):
    """Pad, rotate and quantize token t's input of a product (SPEC 5.1, 5.3, 4.2)."""
    input_at = s.input + t * s.input_stride
    if s.linear_kind == FLOAT_ROWS:
        order(input_at, p.width, s.codes + t * s.codes_stride)
        return
    if p.odd:
        rotate_unpadded(input_at, p.width, p.odd, p.table, scratch)
    elif s.hadamard:
        fill_zero(input_at + 4 * p.source, p.width - p.source)
        fwht(input_at, p.width)
    make_codes(s, input_at, t, p.width, s.largest_code, p.padded)


@kernel
def make_codes(s, input_at, t, width, largest, padded):
    """Quantize token t's input: its codes, their step and sum (SPEC 4.2)."""
    codes = s.codes + t * s.codes_stride
    step, total = quantize(input_at, width, largest, codes, padded)
    floats(s.steps, s.tokens)[t] = step
    int32s(s.sums, s.tokens)[t] = total


@kernel
def cache_of(s, t):
    """Token t's cache (`layout.CACHE`)."""
    return cache_structs(int64s(s.caches, s.tokens)[t], 1)[0]


@kernel
def part_of(s, cache, h):
    """Where in each page of the cache key-value head h's part of the block begins."""
    return (s.layer * s.kv_heads + h) * cache.head_bytes
