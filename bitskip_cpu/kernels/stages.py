"""The stages of a block, in the order in which `forward.block` runs them.

A stage is cut into parts that threads may share: one token, key-value head or band of rows each. A
part owns what it writes: floats are never added across parts, so that neither the number of threads
nor the order in which they take parts can change a bit.
"""

from __future__ import annotations

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
from bitskip_cpu.kernels.attention.attend import attend, rope, store_key, store_value
from bitskip_cpu.kernels.attention.int8 import (
    attend_codes,
    store_key_codes,
    store_value_codes,
)
from bitskip_cpu.kernels.contenders import bound_rows, settle_rows
from bitskip_cpu.kernels.layout import (
    BOUND,
    CACHED_INT8,
    DOWN,
    FLOAT32,
    FLOAT_ROWS,
    INT8_ROWS,
    LANES,
    OUT,
    PRODUCTS,
    QKV,
    QUERIES,
    SETTLE,
    TERNARY,
    UP,
    VOCAB,
)
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.pieces import piece
from bitskip_cpu.kernels.numba_inside.views import cache_structs, floats, int32s, int64s
from bitskip_cpu.kernels.products.rows import (
    float_rows,
    int8_rows,
    order,
    ternary_rows,
    vocab_rows,
)

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
    page, lane = int64s(cache.table, 1)[position // LANES], position % LANES
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


@piece
def attend_part(s, scratch, part):
    """Norm, turn and run a token's query heads that share a key-value head (SPEC 6.1 to 6.8)."""
    kv_head, t = part // s.tokens, part % s.tokens  # a head's keys stay at hand
    cache, position = cache_of(s, t), int64s(s.positions, s.tokens)[t]
    size, sharing = 4 * s.head_dim, s.heads // s.kv_heads
    turned = position * 2 * s.head_dim
    h, end = kv_head * sharing, (kv_head + 1) * sharing
    keys = part_of(s, cache, kv_head)
    caches = int64s(s.caches, s.tokens)
    cold = t == 0 or caches[t] != caches[t - 1]
    # What is read after this: the next token's keys, or those of the next head, of this block or
    # the next one, of the first token.
    soon, soon_keys = (t + 1, keys) if t + 1 < s.tokens else (0, keys + cache.head_bytes)
    later = cache_of(s, soon)
    soon_count = 0
    if soon == 0 or caches[soon] != caches[t]:
        soon_count = int64s(s.positions, s.tokens)[soon] // LANES + 1
    q_at, out_at = s.qkv + t * 4 * (s.attention + 2 * s.kv), s.attended + t * 4 * s.attention
    for i in range(h, end):
        if s.qk_norm:
            head = q_at + i * size
            norm(s, head, params(s) + s.q_norm, head, s.head_dim, scratch)
        rope(q_at + i * size, s.cos + turned, s.sin + turned, s.head_dim)
    while h < end:
        queries = min(QUERIES, end - h)
        q, out, values = q_at + h * size, out_at + h * size, keys + cache.values
        count = soon_count if h + queries == end else 0
        if cache.number_bytes == CACHED_INT8:
            attend_codes(queries, q, cache.table, keys, values, s.head_dim, s.value_width,
                         position + 1, cold, later.table, count, soon_keys, out,
                         scratch)  # fmt: skip
        else:
            attend(queries, q, cache.table, keys, values, cache.number_bytes, s.head_padded,
                   s.head_dim, s.key_slots, s.value_width, position + 1, cold, later.table, count,
                   soon_keys, out, scratch)  # fmt: skip
        h += queries


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
    if s.product >= PRODUCTS:  # of the vocabulary
        plain_rows(s, products[0], scratch, part)  # which has nothing to do with it
    elif s.linear_kind == TERNARY:
        packed_rows(s, products[s.product], scratch, part)
    else:
        plain_rows(s, products[s.product], scratch, part)


@piece
def packed_rows(s, p, scratch, part):
    """Rows of a product of ternary weights (SPEC 4.3)."""
    first = s.first_row + part * s.part_rows
    last = min(first + s.part_rows, s.last_row)
    ternary_rows(s, p, first, last, scratch + s.acc, scratch + s.unpacked)
    add_bias(s, p, first, last)


@piece
def plain_rows(s, p, scratch, part):
    """Rows of the vocabulary, of int8 or of float32 weights (SPEC 4.4, 4.5, 4.8, 9.6)."""
    first = s.first_row + part * s.part_rows
    last = min(first + s.part_rows, s.last_row)
    if s.product == VOCAB:
        vocab_rows(s, first, last, scratch, scratch + s.unpacked, scratch + s.acc)
        return
    if s.product == BOUND:
        bound_rows(s, first, last, scratch + s.acc)
        return
    if s.product == SETTLE:
        settle_rows(s, first, last, scratch)
        return
    if s.linear_kind == INT8_ROWS:
        int8_rows(s, p, first, last, scratch + s.acc)
    else:
        float_rows(s, p, first, last, scratch, scratch + s.unpacked)
    add_bias(s, p, first, last)


@kernel
def add_bias(s, p, first, last):
    """A product's bias, if there is one, to some rows, for all tokens (SPEC 4.7)."""
    if p.bias:
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
