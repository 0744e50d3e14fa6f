"""The structs that every kernel reads: one model, its workspace and the work at hand.

Sizes count elements, `*_stride` and `*_bytes` bytes; a field that names an array holds its address
(int64). `bitskip_cpu.workspace` fills them in and keeps the arrays alive. Letters as in
`bitskip_ref.config`; T tokens at hand.
"""

from __future__ import annotations

import struct

import numpy as np

_STATE = """
    layers hidden heads kv_heads head_dim head_padded value_width attention kv ffn vocab
    linear_kind hadamard layer_norm post_norm sub_norm qk_norm embedding_norm ffn_kind squared
    norm_eps largest_code

    weights layer_bytes params params_stride attn_norm ffn_norm q_norm k_norm attn_sub_norm
    ffn_sub_norm
    first_norm cos sin key_slots embedding embedding_scale vocab_kind
    upper_weights upper_row_bytes upper_norms head_codes
    final_norm vocab_scale exit_layer exit_weights vocab_weights vocab_row_bytes
    head_odd head_table gate_width gate
    linear_rows vocab_rows contend measure choose

    ids x mid qkv attended y up act input input_stride codes codes_stride steps sums
    scratch scratch_stride unpacked acc

    positions caches gates tokens from_row logits exit_from draft_vocab least_lead
    draft_counts draft_of draft
    looks threshold order depths
    followed most_followed seen_count end_count choices top_k penalty temperature reach
    seen ends before filters draws choice_room drawn
    confidence_max confidence_margin confidence_entropy
    contender_count contender_temperature contender_reach
    code_norms band_bounds least_contenders contenders_found

    helpers share_from sync stage layer product first_row last_row part_rows apart
    ahead ahead_bytes ahead_part ahead_apart
"""
_FLOATS = {
    "norm_eps", "largest_code", "confidence_max", "confidence_margin",
    "confidence_entropy", "least_lead", "threshold", "contender_temperature",
    "contender_reach", "penalty", "temperature", "reach",
}  # fmt: skip

STATE = np.dtype(
    [(name, np.float32 if name in _FLOATS else np.int64) for name in _STATE.split()], align=True
)
"""One model on one workspace. In order: shape and kind (SPEC 1); where its weights are; workspace
of up to CHUNK tokens; the call at hand: int64 [T] the tokens' `positions`, and where their `caches`
are, a CACHE each; the stage at hand, which threads share (`kernels.share`).

`linear_rows`, `vocab_rows`, `contend`, `measure`, `choose`: addresses of compiled pieces
(`kernels.stages`, `contenders`, `measures`, `choice`): those that this model needs, and the last
three only once they are used.

A product's part is `part_rows` rows from `first_row` on, part after part; and as many `apart` rows
further on, below `last_row`, unless `apart` is 0.
`ahead`: the `ahead_bytes` of weights that the product after the one at hand reads, in parts of
`ahead_part` bytes, and as many `ahead_apart` bytes further on; 0 bytes: not known.

Exit blocks are numbered behind the blocks: `exit_layer` is the number of that of the exit at hand,
0: it has none; `exit_weights` is to its products what `weights` is to a block's.

The call is about `tokens` of them, from `from_row` on. `gates`: f32 [T]. `draft_counts`, int64 [T]:
drafts after each, at most; `draft_of`, int64 [T]: behind which of them each token stands then;
`draft`: the one that a lead decides, -1: none.
`gate`: the routing gate at hand, as `Weights.gate_at` lays it out; `looks`: int64 [L], where those
of the blocks are that LOOK looks after, else 0. It leaves tokens in another order: `order`, int64
[T], their numbers; `depths`, int64 [T], blocks that each ran.
STEPS goes on with one token: `followed` more, `most_followed` at most, whose ids it leaves behind
the first of `ids`, none of them one of `ends`, int32 [end_count]. `penalty` counts `seen`, int32
[seen_count], each id once; `before`, f32 [V]: logits without it. Tokens are chosen among the first
`choices` logits, by SPEC 9.1 at temperature 0, else by 9.2 (`kernels.choice`): `filters`, f64 [2]:
top_p and min_p; `draws`, f64: one for each that follows. CHOOSE leaves one in `drawn`.
`codes` of rows of floats are what `float_simd.order` makes of a token's input.
It is argument and scratch: `forward` changes `tokens`, `x`, `positions` and the like for a while
and puts them back."""

_CACHE = "number_bytes head_bytes values table attend"

CACHE = np.dtype([(name, np.int64) for name in _CACHE.split()])
"""The keys and values of one sequence, in pages of LANES positions. `table`: where the address of
each page stands, int64 [pages]. A page holds, for each block and in it each key-value head, a part
of `head_bytes` bytes: the keys, and from byte `values` on the values, of numbers of `number_bytes`
bytes (`attention/attend.py` has their order). `attend`: address of the compiled piece that runs a
part of ATTEND over such numbers (`stages.attending`)."""

_PRODUCT = (
    "weights rows width source row_bytes padded units tail alphas end0 end1 bias odd table "
    "out out_stride"
)

PRODUCT = np.dtype([(name, np.int64) for name in _PRODUCT.split()])
"""One of a block's four products: q|k|v, o, gate|up, down. `weights`: its bytes' offset in a block;
`source`: floats of input, `width`: with the Hadamard padding, `padded`: with that of tiles, which
have `units` and a `tail` (`ternary_layout`); `row_bytes` of a packed row: a tile's over its rows;
`alphas`: index of its first weight scale, whose rows end at `end0`, the second's at `end1` (int8:
row 0's); `bias`: where its biases lie in the block's parameters, 0: it has none; `odd`, `table`:
odd part of the width and address of `hartley` of it (SPEC 5.3), 0: it is not turned so."""

QKV, OUT, UP, DOWN, VOCAB, BOUND, SETTLE = range(7)
PRODUCTS = 4  # of a block
NORMS, LEAST, FOUND = -1, -2, -3  # of `contend`, in place of a part
GATES, CONFIDENCE = -1, -2  # of `measure`, in place of a draft
INT8, INT6, INT4, FLOAT32, FLOAT16, BFLOAT16 = range(6)  # vocab_kind: integers, then floats
TERNARY, INT8_ROWS, FLOAT_ROWS = range(3)  # linear_kind
CACHED_FLOAT32, CACHED_FLOAT16, CACHED_INT8 = 4, 2, 1  # number_bytes: of a number in the cache
SWIGLU, GATED_RELU2, RELU2 = 0, 1, 2  # ffn_kind
CHUNK = 128  # most tokens at a time
LANES = 16  # positions in a page of the cache
QUERIES = 4  # most heads that share a pass over keys and values
PANEL = 64  # positions of an int8 cache whose scores are worked on together; whole pages
LEVELS = 24  # of the streamed tree: up to 2^24 pages
BAND = 64  # rows of a product whose int32 sums are converted together; whole tiles
ACC_STRIDE = 4 * BAND  # bytes from one token's sums to the next
FLOAT_TOKENS, FLOAT_BLOCK = 8, 8  # tokens x rows of floats that are multiplied together
FLOAT_LEVELS = 24  # of the tree of their features, outside registers
WIDENED = 32  # rows of float16 or bfloat16 that are widened together


def key_slots(padded: int) -> np.ndarray:
    """Where a cached key of E' features (a power of two) holds each, int32 [E'].

    Their numbers' bits are reversed: what the tree of SPEC 2.2 adds lies side by side.
    """
    bits = padded.bit_length() - 1
    return np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(padded)], np.int32)


def int8_scratch(positions: int, head_dim: int, value_width: int) -> int:
    """Bytes that `attention.int8.over_int8` needs for QUERIES queries over so many positions."""
    row = -(-positions // PANEL) * PANEL
    scores, weights, sums = 4 * row, 2 * row, 2 * (4 * value_width + 256)
    tops, asks = 8 * PANEL, 8 * (row // PANEL)
    query = scores + weights + 8 + head_dim + 67 + sums + tops + asks
    return QUERIES * query + 4 * row + 160


def float_room(width: int) -> int:
    """Bytes that `products.float_simd.float_sums` needs for rows of so many floats, and those of
    WIDENED such rows."""
    sums = FLOAT_LEVELS * FLOAT_TOKENS * FLOAT_BLOCK * 64
    return sums + (FLOAT_TOKENS + WIDENED) * 4 * width


# What `kernels.forward.run` does, added up; in this order.
EMBED, DRAFT, BLOCKS, LOOK, FILL, EXIT, CONTEND, STEPS, CHOOSE, MEASURE, GATE, HELP = (
    1 << i for i in range(12)
)

SYNC_STAGE, SYNC_AHEAD, SYNC_AHEAD_AT, SYNC_AHEAD_END, SYNC_AHEAD_PART = 0, 8, 16, 24, 32
SYNC_AHEAD_APART = 40
SYNC_PENDING, SYNC_STOP, SYNC_RANGES = 64, 128, 192
"""Bytes from `sync` to what threads share (`kernels.share`)."""


def sync_words(threads: int) -> int:
    """How many int64 numbers `sync` has."""
    return SYNC_RANGES // 8 + 8 * threads


def row(*names: str) -> tuple[struct.Struct, int]:
    """How to write fields of STATE that lie in a row, and where the first lies.

    One by one they would take as long as some kernels.
    """
    kinds = {np.dtype(np.int64): "q", np.dtype(np.float32): "f"}
    fields = [STATE.fields[name] for name in names]  # type: ignore[index]
    at = fields[0][1]
    for name, (kind, offset, *_) in zip(names, fields, strict=True):
        assert offset == at, f"{name} does not lie behind the field before"
        at += kind.itemsize
    return struct.Struct("=" + "".join(kinds[kind] for kind, *_ in fields)), fields[0][1]
