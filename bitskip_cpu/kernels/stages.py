"""The parts of a block's work that threads may share, one token, head or band of rows each.

A part owns what it writes: floats are never added across parts, so that neither the number of
threads nor the order in which they take parts can change a bit.
"""

from __future__ import annotations

import numpy as np

from bitskip_cpu.kernels.arithmetic.elementwise import (
    copy,
    ffn_activation,
    fill_zero,
    fwht,
    layer_norm,
    quantize,
    rms_norm,
)
from bitskip_cpu.kernels.attention.attend import attend, store_key, store_value, turn
from bitskip_cpu.kernels.layout import (
    DOWN,
    FLOAT16,
    FLOAT32,
    HEAD,
    OUT,
    QKV,
    QUERIES,
    UP,
)
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int32s
from bitskip_cpu.kernels.products.rows import float_rows, head_rows, ternary_rows

ATTENTION_IN, STORE, ATTEND, OUT_IN, FFN_IN, DOWN_IN, BLOCK_OUT, EXIT_IN, ROWS = range(9)
EIGHT_BITS = np.float32(127.0)


@kernel
def run_part(s, products, thread, part):
    """One part of the state's job."""
    job = s.job
    scratch = s.scratch + thread * s.scratch_stride
    if job == ROWS:
        rows(s, products, scratch, part)
    elif job == ATTEND:
        attention_part(s, scratch, part)
    elif job == STORE:
        store(s, part)
    else:
        token_part(s, products, scratch, job, part)


@kernel
def token_part(s, products, scratch, job, t):
    """What lies between two products, for token t."""
    wide = 4 * s.hidden
    x, mid, y = s.x + t * wide, s.mid + t * wide, s.y + t * wide
    row = s.row + t * s.row_stride
    params = s.params + s.layer * s.params_stride
    if job == ATTENTION_IN:
        if s.post_norm:
            copy(x, row, s.hidden)
        else:
            norm(s, x, params + s.attn_norm, row, s.hidden, scratch)
        feed(s, products[QKV], t)
    elif job == OUT_IN:
        a = s.attended + t * 4 * s.attention
        if s.sub_norm:
            norm(s, a, params + s.attn_sub_norm, row, s.attention, scratch)
        else:
            copy(a, row, s.attention)
        feed(s, products[OUT], t)
    elif job == FFN_IN:
        residual(x, y, mid, s.hidden)
        if s.post_norm:
            norm(s, mid, params + s.attn_norm, mid, s.hidden, scratch)
            copy(mid, row, s.hidden)
        else:
            norm(s, mid, params + s.ffn_norm, row, s.hidden, scratch)
        feed(s, products[UP], t)
    elif job == DOWN_IN:
        act = s.act + t * 4 * s.ffn
        up = s.up + t * products[UP].out_stride
        ffn_activation(s.ffn_kind, s.squared, up, act, s.ffn)
        if s.sub_norm:
            norm(s, act, params + s.ffn_sub_norm, row, s.ffn, scratch)
        else:
            copy(act, row, s.ffn)
        feed(s, products[DOWN], t)
    elif job == BLOCK_OUT:
        residual(mid, y, x, s.hidden)
        if s.post_norm:
            norm(s, x, params + s.ffn_norm, x, s.hidden, scratch)
    else:
        exit_in(s, s.x + (s.exit_from + t) * wide, t, scratch)


@kernel
def norm(s, x, weight, y, n, scratch):
    """The configured norm (SPEC 3)."""
    if s.layer_norm:
        layer_norm(x, weight, y, n, s.norm_eps, scratch)
    else:
        rms_norm(x, weight, y, n, s.norm_eps, scratch)


@kernel
def residual(x_at, y_at, out_at, n):
    """out = x + y."""
    x, y, out = floats(x_at, n), floats(y_at, n), floats(out_at, n)
    for i in range(n):
        out[i] = x[i] + y[i]


@kernel
def feed(s, p, t):
    """Make token t's row the input of a product: pad, rotate, quantize (SPEC 5.1, 4.2)."""
    if not s.ternary:
        return
    row = s.row + t * s.row_stride
    if s.hadamard:
        fill_zero(row + 4 * p.source, p.width - p.source)
        fwht(row, p.width)
    step, total = quantize(row, p.width, s.largest_code, s.codes + t * s.codes_stride, p.padded)
    floats(s.steps, s.tokens)[t] = step
    int32s(s.sums, s.tokens)[t] = total


@kernel
def exit_in(s, x, t, scratch):
    """Final norm of one token, and its codes for an integer head (SPEC 8.1, 4.4)."""
    row = s.row + t * s.row_stride
    norm(s, x, s.final_norm, row, s.hidden, scratch)
    if s.head_kind == FLOAT16 or s.head_kind == FLOAT32:
        return
    at = s.codes + t * s.codes_stride
    step, total = quantize(row, s.hidden, EIGHT_BITS, at, (s.hidden + 63) // 64 * 64)
    floats(s.steps, s.tokens)[t] = step
    int32s(s.sums, s.tokens)[t] = total


@kernel
def store(s, t):
    """Turn token t's keys; keys and values into the cache (SPEC 6.1, 6.4, 6.5)."""
    position, e = s.position + t, 4 * s.head_dim
    half = e >> 1
    key = s.qkv + t * 4 * (s.attention + 2 * s.kv) + 4 * s.attention
    value = key + 4 * s.kv
    for h in range(s.kv_heads):
        turn(key + h * e, s.cos + position * half, s.sin + position * half, s.head_dim)
        store_key(key + h * e, keys_of(s, h), s.cache_size, s.head_padded, s.head_dim, s.key_slots,
                  position)  # fmt: skip
        store_value(
            value + h * e, values_of(s, h), s.cache_size, s.value_width, s.head_dim, position
        )


@kernel
def keys_of(s, h):
    """Where the block's cache holds key-value head h's keys."""
    return s.keys + s.cache_size * (s.layer * s.kv_heads + h) * s.capacity * s.head_padded


@kernel
def values_of(s, h):
    """Where the block's cache holds key-value head h's values."""
    return s.values + s.cache_size * (s.layer * s.kv_heads + h) * s.capacity * s.value_width


@kernel
def attention_part(s, scratch, part):
    """The query heads of one token that share a key-value head (SPEC 6)."""
    kv_head, t = part // s.tokens, part % s.tokens  # a head's keys stay at hand
    position, e, group = s.position + t, 4 * s.head_dim, s.heads // s.kv_heads
    half = e >> 1
    h, end = kv_head * group, (kv_head + 1) * group
    q_at, out_at = s.qkv + t * 4 * (s.attention + 2 * s.kv), s.attended + t * 4 * s.attention
    for i in range(h, end):
        turn(q_at + i * e, s.cos + position * half, s.sin + position * half, s.head_dim)
    while h < end:
        queries = min(QUERIES, end - h)
        attend(queries, q_at + h * e, keys_of(s, kv_head), values_of(s, kv_head), s.cache_size,
               s.head_padded, s.head_dim, s.key_slots, s.value_width, position + 1, t == 0,
               out_at + h * e, scratch)  # fmt: skip
        h += queries


@kernel
def rows(s, products, scratch, part):
    """A band of a product's rows."""
    first = s.first_row + part * s.grain
    last = min(first + s.grain, s.last_row)
    if s.product == HEAD:
        head_rows(s, first, last, scratch, scratch + s.acc)
    elif s.ternary:
        p = products[s.product]
        ternary_rows(s, p, first, last, scratch + s.acc, scratch + s.unpacked)
    else:
        float_rows(s, products[s.product], first, last, scratch)
