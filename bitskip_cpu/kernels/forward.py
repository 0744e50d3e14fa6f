"""The forward pass: one compiled function, no Python between the layers (SPEC sections 7 and 8)."""

from __future__ import annotations

import numpy as np

from bitskip_cpu.kernels.arithmetic.elementwise import copy, largest_id, rotate_unpadded
from bitskip_cpu.kernels.arithmetic.float16 import widen, widen_bfloat16
from bitskip_cpu.kernels.choice import choose
from bitskip_cpu.kernels.layout import (
    BFLOAT16,
    BLOCKS,
    BOUND,
    CHOOSE,
    CHUNK,
    CONFIDENCE,
    CONTEND,
    DOWN,
    DRAFT,
    EMBED,
    EXIT,
    FILL,
    FLOAT16,
    FLOAT32,
    FOUND,
    GATE,
    GATES,
    HELP,
    LANES,
    LEAST,
    LOOK,
    MEASURE,
    NORMS,
    OUT,
    PRODUCTS,
    QKV,
    SETTLE,
    STEPS,
    UP,
    VOCAB,
)
from bitskip_cpu.kernels.measures import measure
from bitskip_cpu.kernels.numba_inside import atomics
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import (
    floats,
    int8s,
    int32s,
    int64s,
    product_structs,
    state_structs,
)
from bitskip_cpu.kernels.parts import cost_of, parts_of, rows_apart, rows_of_part
from bitskip_cpu.kernels.products.ternary_layout import TILE_ROWS
from bitskip_cpu.kernels.share import help_out, run_stage, shared
from bitskip_cpu.kernels.stages import (
    ATTEND,
    ATTENTION_IN,
    BLOCK_OUT,
    DOWN_IN,
    EXIT_IN,
    FFN_IN,
    OUT_IN,
    ROWS,
    STORE,
    contend,
    norm,
    params,
)

f32 = np.float32
fetch = atomics.fetch
ZERO, ONE = f32(0.0), f32(1.0)

SETTLE_BYTES = 16  # of a row, on average, where few are read


@kernel
def embed(s, t):
    """Token t's embedding, and its norm if there is one (SPEC 4.4, 5.4, 7.4)."""
    n, token, x_at = s.hidden, np.int64(int32s(s.ids, s.tokens)[t]), s.x + t * 4 * s.hidden
    if s.vocab_kind < FLOAT32:
        codes, x = int8s(s.embedding + token * n, n), floats(x_at, n)
        scale = floats(s.embedding_scale, s.vocab)[token]
        for i in range(n):
            x[i] = f32(codes[i]) * scale
        if s.head_odd:
            rotate_unpadded(x_at, n, s.head_odd, s.head_table, s.scratch)
    elif s.vocab_kind == FLOAT16:
        widen(s.embedding + token * 2 * n, x_at, n)
    elif s.vocab_kind == BFLOAT16:
        widen_bfloat16(s.embedding + token * 2 * n, x_at, n)
    else:
        copy(s.embedding + token * 4 * n, x_at, n)
    if s.embedding_norm:
        norm(s, x_at, s.first_norm, x_at, n, s.scratch)


@kernel
def product(s, products, index, first, last, row_bytes):
    """Rows first..last-1 of a product for all tokens."""
    s.product, s.first_row, s.last_row = index, first, last
    s.part_rows = rows_of_part(s, index, first, last, row_bytes)
    s.apart = rows_apart(s, index, first, last, s.part_rows)
    parts = parts_of(first, last, s.part_rows, s.apart)
    run_stage(s, products, ROWS, parts, cost_of(s, first, last, row_bytes))


@kernel
def expect_nothing(s):
    """What comes after the product at hand is not known yet, or not shared."""
    s.ahead_bytes = 0


@kernel
def expect(s, index, weights_at, first, last, row_bytes):
    """A product comes after the stages at hand: who has to wait may read its weights meanwhile."""
    rows = rows_of_part(s, index, first, last, row_bytes)
    apart = rows_apart(s, index, first, last, rows)
    s.ahead, s.ahead_bytes = weights_at + first * row_bytes, (last - first) * row_bytes
    s.ahead_part, s.ahead_apart = rows * row_bytes, apart * row_bytes
    if not shared(s, parts_of(first, last, rows, apart), cost_of(s, first, last, row_bytes)):
        expect_nothing(s)


@kernel
def expect_product(s, products, index, layer, first):
    """The same for one of a block's, from row `first` on."""
    p = products[index]
    weights_at = s.weights + layer * s.layer_bytes + p.weights
    expect(s, index, weights_at, first, p.rows, p.row_bytes)


@kernel
def ask_for_norm(s, weight_at):
    """Ask for a norm's weight, which memory would be waited for after the product at hand."""
    fetch(weight_at, (s.hidden + LANES - 1) // LANES)


@kernel
def keys_values(s, products, first_row):
    """Run a block up to the cache; of q|k|v only the rows from `first_row` on."""
    p, tokens = products[QKV], s.tokens
    expect_product(s, products, QKV, s.layer, first_row)
    run_stage(s, products, ATTENTION_IN, tokens, tokens * s.input_stride)
    if first_row:
        expect_nothing(s)
    else:
        expect_product(s, products, OUT, s.layer, 0)
    product(s, products, QKV, first_row, p.rows, p.row_bytes)
    run_stage(s, products, STORE, tokens, tokens * 8 * s.kv)


@kernel
def block(s, products, layer, more):
    """Run one block on the tokens at hand: the stages of `stages.py` in order (SPEC 7.2, 7.3).

    `more`: whether they run the block after it, too, next.
    """
    s.layer = layer
    tokens, cost = s.tokens, s.tokens * s.input_stride
    keys_values(s, products, 0)
    seen = 4 * (int64s(s.positions, tokens)[tokens - 1] + 1) * s.attention
    # Little attention is the leader's alone: that helpers read o's weights meanwhile is worth more.
    run_stage(s, products, ATTEND, tokens * s.kv_heads, tokens * seen // 4)
    run_stage(s, products, OUT_IN, tokens, cost)
    expect_product(s, products, UP, layer, 0)
    ask_for_norm(s, params(s) + s.ffn_norm)
    product(s, products, OUT, 0, products[OUT].rows, products[OUT].row_bytes)
    feed_forward(s, products, more)


@kernel
def feed_forward(s, products, more):
    """The second half of a block, or an exit block."""
    tokens, cost = s.tokens, s.tokens * s.input_stride
    run_stage(s, products, FFN_IN, tokens, cost)
    expect_product(s, products, DOWN, s.layer, 0)
    product(s, products, UP, 0, products[UP].rows, products[UP].row_bytes)
    run_stage(s, products, DOWN_IN, tokens, cost)
    if s.layer + 1 < s.layers:
        ask_for_norm(s, params(s) + s.params_stride + s.attn_norm)
    if more:
        expect_product(s, products, QKV, s.layer + 1, 0)
    else:
        expect_nothing(s)
    product(s, products, DOWN, 0, products[DOWN].rows, products[DOWN].row_bytes)
    run_stage(s, products, BLOCK_OUT, tokens, cost)


@kernel
def enter_exit(s, products, rows_at, row_bytes):
    """The exit's own block, if any, and norm for tokens from `exit_from` on (SPEC 8.1, 8.8).

    From here on they are the tokens at hand, until the caller puts tokens, x and weights back.
    Rows of the vocabulary are read next.
    """
    s.tokens, s.x = s.tokens - s.exit_from, s.x + s.exit_from * 4 * s.hidden
    if s.exit_layer:  # in `mid`: blocks may go on from x
        copy(s.x, s.mid, s.tokens * s.hidden)
        s.x, s.layer, s.weights = s.mid, s.exit_layer, s.exit_weights
        expect_product(s, products, UP, s.layer, 0)
        feed_forward(s, products, False)
    expect(s, VOCAB, rows_at, 0, s.vocab, row_bytes)
    run_stage(s, products, EXIT_IN, s.tokens, s.tokens * s.input_stride)
    expect_nothing(s)


@kernel
def exit_logits(s, products):
    """Logits of the tokens from `exit_from` on (SPEC 8.1)."""
    tokens, x, weights = s.tokens, s.x, s.weights
    enter_exit(s, products, s.vocab_weights, s.vocab_row_bytes)
    product(s, products, VOCAB, 0, s.vocab, s.vocab_row_bytes)
    s.tokens, s.x, s.weights = tokens, x, weights


@kernel
def contending_logits(s, products):
    """As `exit_logits`, with -inf in place of logits that cannot be chosen (SPEC 9.6)."""
    tokens, x, weights = s.tokens, s.x, s.weights
    enter_exit(s, products, s.upper_weights, s.upper_row_bytes)
    contend(s.contend, s, s.scratch, NORMS)
    product(s, products, BOUND, 0, s.vocab, s.upper_row_bytes)
    contend(s.contend, s, s.scratch, LEAST)
    product(s, products, SETTLE, 0, s.vocab, SETTLE_BYTES)
    contend(s.contend, s, s.scratch, FOUND)
    s.tokens, s.x, s.weights = tokens, x, weights


@kernel
def draft(s, products, last):
    """SPEC 11.1: the tokens at hand, of a sequence each, and drafts after them: blocks 0..last-1.

    They come with the least `draft_counts` first. The drafts after all of them follow behind them,
    then those after these, and `draft_of` says whose they are; a sequence ends with the first after
    which a draft is unsure, or with its last. `tokens` becomes how many were run.
    """
    x, ids, vocab, exit_from = s.x, s.ids, s.vocab, s.exit_from
    positions_at, caches_at, drafted = s.positions, s.caches, int32s(ids, CHUNK)
    positions, caches = int64s(positions_at, CHUNK), int64s(caches_at, CHUNK)
    counts, of = int64s(s.draft_counts, CHUNK), int64s(s.draft_of, CHUNK)
    for t in range(s.tokens):
        of[t] = t
    begin, end, step = 0, s.tokens, 0
    while begin < end:
        for t in range(s.tokens):
            embed(s, t)
        for layer in range(last):
            block(s, products, layer, layer + 1 < last)
        s.exit_from = 0
        while s.exit_from < s.tokens and counts[of[begin + s.exit_from]] <= step:
            s.exit_from += 1
        more = end
        if s.exit_from < s.tokens:
            s.vocab = s.draft_vocab
            exit_logits(s, products)
            s.vocab = vocab
            for t in range(begin + s.exit_from, end):
                measure(s.measure, s, s.scratch, t - begin - s.exit_from)
                if s.draft < 0:
                    continue
                drafted[more] = s.draft
                positions[more], caches[more], of[more] = positions[t] + 1, caches[t], of[t]
                more += 1
        begin, end, step = end, more, step + 1
        s.tokens = end - begin
        s.x, s.ids = x + begin * 4 * s.hidden, ids + begin * 4
        s.positions, s.caches = positions_at + begin * 8, caches_at + begin * 8
    s.tokens, s.x, s.ids, s.exit_from = begin, x, ids, exit_from
    s.positions, s.caches = positions_at, caches_at


@kernel
def look(s, products, first, last):
    """Blocks first..last-1 of tokens that leave where their gate says so (SPEC 8.3).

    Those that have left lie behind the others, and leave keys and values in a block just before the
    others run it, which may attend to them (SPEC 8.6).
    """
    tokens, x, positions, caches = s.tokens, s.x, s.positions, s.caches
    order, depths, looks = int64s(s.order, tokens), int64s(s.depths, tokens), int64s(s.looks, last)
    for t in range(tokens):
        order[t], depths[t] = t, last
    live = tokens
    for layer in range(first, last):
        if live < tokens:
            s.tokens, s.x = tokens - live, x + live * 4 * s.hidden
            s.positions, s.caches = positions + live * 8, caches + live * 8
            skipped(s, products, layer)
            s.tokens, s.x, s.positions, s.caches = live, x, positions, caches
        if live:
            block(s, products, layer, False)
            s.gate = looks[layer]
            if s.gate:
                live = leave(s, layer + 1)
    s.tokens = tokens


@kernel
def leave(s, ran):
    """Put tokens whose gate stops them, after `ran` blocks, behind the others; how many go on."""
    measure(s.measure, s, s.scratch, GATES)
    live, gates, depths = s.tokens, floats(s.gates, s.tokens), int64s(s.depths, s.tokens)
    t = 0
    while t < live:
        if gates[t] > s.threshold:
            live -= 1
            depths[live], gates[t] = ran, gates[live]
            if t < live:
                swap(s, t, live)
        else:
            t += 1
    s.tokens = live
    return live


@kernel
def swap(s, a, b):
    """Tokens a and b change places."""
    n = s.hidden
    x_a, x_b = s.x + a * 4 * n, s.x + b * 4 * n
    copy(x_a, s.scratch, n)
    copy(x_b, x_a, n)
    copy(s.scratch, x_b, n)
    positions, caches = int64s(s.positions, b + 1), int64s(s.caches, b + 1)
    order = int64s(s.order, b + 1)
    positions[a], positions[b] = positions[b], positions[a]
    caches[a], caches[b] = caches[b], caches[a]
    order[a], order[b] = order[b], order[a]


@kernel
def skipped(s, products, layer):
    """Keys and values of a block that the tokens at hand skip (SPEC 8.6)."""
    s.layer = layer
    keys_values(s, products, s.attention // TILE_ROWS * TILE_ROWS)


@kernel
def chosen(s):
    """The token after the logits at hand (SPEC 9.1, 9.2); -1: one that ends, or none (9.5)."""
    n = s.choices
    z, seen, before = floats(s.logits, n), int32s(s.seen, n), floats(s.before, n)
    penalised = s.seen_count if s.penalty != ONE else 0
    for i in range(penalised):
        value = z[seen[i]]
        before[i] = value
        z[seen[i]] = value / s.penalty if value > ZERO else value * s.penalty
    token = largest_id(s.logits, n)
    if token >= 0 and s.temperature > ZERO:
        choose(s.choose, s, s.scratch, token)
        token = s.drawn
    for i in range(penalised):
        z[seen[i]] = before[i]
    ends = int32s(s.ends, s.end_count)
    for i in range(s.end_count):
        if ends[i] == token:
            token = -1
    return token


@kernel
def go_on(s):
    """Have the token at hand that follows the one at hand; whether there is to be one."""
    if s.followed == s.most_followed:
        return False
    token = chosen(s)
    if token < 0:
        return False
    s.followed += 1
    ids, positions, seen = int32s(s.ids, CHUNK), int64s(s.positions, 1), int32s(s.seen, s.vocab)
    ids[0], ids[s.followed] = token, token
    positions[0] += 1
    known = False
    for i in range(s.seen_count):
        known = known or seen[i] == token
    if not known:
        seen[s.seen_count] = token
        s.seen_count += 1
    return True


def run(state_at, products_at, actions, first, last):
    """Do `actions` (`layout`) on a state and its products; BLOCKS and FILL: blocks first..last-1.

    DRAFT: through blocks 0..first-1. LOOK: as BLOCKS, to where gates say, and FILL from there.
    STEPS: all of it again for each token that follows. CHOOSE: one among given logits.
    HELP: live as helper thread `first`. Tokens count from `from_row` on, but for GATE's results,
    logits, and what LOOK says of them. No argument is checked: `bitskip_cpu.engine` does.
    """
    s, products = state_structs(state_at, 1)[0], product_structs(products_at, PRODUCTS)
    if actions & HELP:
        help_out(s, products, first)
        return
    x, ids, positions, caches = s.x, s.ids, s.positions, s.caches
    s.x, s.ids = x + s.from_row * 4 * s.hidden, ids + s.from_row * 4
    s.positions, s.caches = positions + s.from_row * 8, caches + s.from_row * 8
    more = True
    while more:
        if actions & EMBED:
            for t in range(s.tokens):
                embed(s, t)
        if actions & DRAFT:
            draft(s, products, first)
        if actions & BLOCKS:
            for layer in range(first, last):
                block(s, products, layer, layer + 1 < last)
        if actions & LOOK:
            look(s, products, first, last)
        if actions & FILL:
            for layer in range(first, last):
                skipped(s, products, layer)
        if actions & EXIT:
            exit_logits(s, products)
        if actions & CONTEND:
            contending_logits(s, products)
        more = False
        if actions & STEPS:
            actions |= EMBED  # also where the first token was embedded before
            more = go_on(s)
    if actions & CHOOSE:
        s.drawn = chosen(s)
    if actions & MEASURE:
        measure(s.measure, s, s.scratch, CONFIDENCE)
    if actions & GATE:
        measure(s.measure, s, s.scratch, GATES)
    s.x, s.ids, s.positions, s.caches = x, ids, positions, caches
