"""The memory that kernels work in, and the struct that tells them where everything is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.cache import KVCache, padded_keys, padded_values
from bitskip_cpu.choices import Choices
from bitskip_cpu.compiling import KERNELS, rows_of
from bitskip_cpu.kernels.layout import (
    BAND,
    BFLOAT16,
    CHUNK,
    CONTEND,
    DOWN,
    EXIT,
    FLOAT16,
    FLOAT32,
    FLOAT_ROWS,
    GATED_RELU2,
    INT4,
    INT6,
    INT8,
    INT8_ROWS,
    LANES,
    LEVELS,
    OUT,
    QKV,
    QUERIES,
    RELU2,
    STATE,
    SWIGLU,
    TERNARY,
    UP,
    float_room,
    int8_scratch,
    key_slots,
    row,
    sync_words,
)
from bitskip_cpu.weights import Weights
from bitskip_ref.config import HEAD_BITS, odd_part
from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.draft import MOST, Draft, bounded
from bitskip_ref.hartley import hartley
from bitskip_ref.rope import rope_table
from bitskip_ref.rows import Run
from bitskip_ref.safetensors_file import give_back

FFN_KINDS = {"swiglu": SWIGLU, "gated_relu2": GATED_RELU2, "relu2": RELU2}
LINEAR_KINDS = {"ternary": TERNARY, "int8": INT8_ROWS, "float32": FLOAT_ROWS}
VOCAB_KINDS = {
    "int8": INT8, "int6": INT6, "int4": INT4, "float32": FLOAT32, "float16": FLOAT16,
    "bfloat16": BFLOAT16,
}  # fmt: skip
LEAST_ROOM = 1 << 15  # bytes for unpacked tiles: no kernel of products.amx takes more
REREAD = 4  # contenders do not pay if more than one of so many rows is one
WHOLE, MOST_WHOLE = 15, 1023  # heads then read whole; eight times as many each time, at most
SPARSE = 1 << 27  # bytes of an embedding from which most of it need not stay mapped
LOOKED_UP = 16  # of its rows that are mapped at a time
SHARE_FROM = 1 << 16  # bytes of weights below which a stage is not worth sharing


EXIT_ROW, EXIT_AT = row(
    "final_norm", "vocab_scale", "exit_layer", "exit_weights", "vocab_weights", "vocab_row_bytes"
)
UPPER_ROW, UPPER_AT = row(
    "upper_weights", "upper_row_bytes", "upper_norms", "head_codes", "final_norm", "vocab_scale",
    "exit_layer", "exit_weights",
)  # fmt: skip
CONTENDERS, CONTENDERS_AT = row("contender_count", "contender_temperature", "contender_reach")
LOGITS, LOGITS_AT = row("logits", "exit_from")
ROWS, ROWS_AT = row("tokens", "from_row")
DRAFT_ROW, DRAFT_AT = row("draft_vocab", "least_lead")
TOKENS, FROM_ROW, FOUND, GATE = (
    STATE.fields[name][1] // 8  # type: ignore[index]
    for name in ("tokens", "from_row", "contenders_found", "gate")
)


def at_most(value: float) -> float:
    """The largest float32 not above the value: gates, from 0 to 1, exceed both or neither."""
    value = min(max(value, -1), 2)  # an int may be larger than any float
    near = np.float32(value)
    below = np.nextafter(near, np.float32(-np.inf))
    return float(below) if float(near) > value else float(near)  # two float32 would compare equal


class Workspace:
    """Buffers for up to CHUNK tokens; allocated once, reused by every call."""

    def __init__(self, weights: Weights, threads: int, share_from: int = SHARE_FROM) -> None:
        """`share_from`: bytes of weights from which a stage is shared; 0: always."""
        self.weights = weights
        self._arrays: list[np.ndarray] = []  # whose addresses the structs hold
        states, self.products = np.zeros(1, STATE), weights.products.copy()
        self.state = states[0]
        self.structs = self._keep(states), self._keep(self.products)
        """Addresses of state and products, as `kernels.forward.run` takes them."""
        self._bytes = states.view(np.uint8).data
        self._words = self._bytes.cast("q")
        self._exits: dict[int, tuple[int, ...]] = {}  # what EXIT_ROW is for each
        self._uppers: dict[int, tuple[int, ...] | None] = {}  # UPPER_ROW; None: there is none
        self._vocab = weights.config.vocab_size
        self.sparse: np.ndarray | None = None
        """A large embedding, of which a few rows are read where it is mapped."""
        self._looked_up = 0  # of its rows, since it was given back
        self._whole = 0  # calls that are to read whole heads before contenders are tried again
        self._next_whole = WHOLE  # how many it is the next time
        self._looks: tuple[tuple[int, ...], int, float] | None = None  # as set
        self._gates = np.zeros(weights.config.num_hidden_layers, np.int64)
        self.state["looks"] = self._keep(self._gates)
        self._shape()
        self._weights()
        self._buffers()
        self._scratch(threads, share_from)
        self.choices = Choices(self.state, self._bytes, self.ids, self._vocab)
        """How tokens are chosen in a call."""

    def _shape(self) -> None:
        c, s = self.weights.config, self.state
        for name, value in {
            "layers": c.num_hidden_layers,
            "hidden": c.hidden_size, "heads": c.num_attention_heads,
            "kv_heads": c.num_key_value_heads, "head_dim": c.head_dim,
            "head_padded": padded_keys(c.head_dim), "value_width": padded_values(c.head_dim),
            "attention": c.attention_size,
            "kv": c.kv_size, "ffn": c.intermediate_size, "vocab": c.vocab_size,
            "linear_kind": LINEAR_KINDS[c.linear], "hadamard": c.hadamard,
            "layer_norm": c.norm == "layer", "post_norm": c.norm_position == "post",
            "sub_norm": c.sub_norm, "qk_norm": c.qk_norm, "embedding_norm": c.embedding_norm,
            "ffn_kind": FFN_KINDS[c.ffn], "squared": c.relu2_in_linear, "norm_eps": c.norm_eps,
            "largest_code": 2 ** (c.activation_bits - 1) - 1,
            "vocab_kind": VOCAB_KINDS[c.head_format], "gate_width": c.gate_width,
        }.items():  # fmt: skip
            s[name] = value

    def _weights(self) -> None:
        w, s = self.weights, self.state
        s["linear_rows"], s["vocab_rows"] = map(KERNELS.piece, rows_of(w.config))
        s["weights"], s["layer_bytes"] = self._keep(w.linear), w.layer_bytes
        s["params"], s["params_stride"] = self._keep(w.params), w.params.strides[0]
        for name, offset in w.norm_offsets.items():
            s[name] = offset
        s["cos"], s["sin"] = (self._keep(table) for table in rope_table(w.config))
        s["key_slots"] = self._keep(key_slots(padded_keys(w.config.head_dim)))
        rows = w.tensors["embed_tokens.weight"]
        s["embedding"] = self._keep(rows)
        if w.config.head_format in HEAD_BITS:
            self.sparse = rows if rows.nbytes >= SPARSE else None
            s["embedding_scale"] = self._keep(w.tensors["embed_tokens.scale"])
        if w.config.hadamard and w.config.linear == "int8":
            for p in self.products:
                p["odd"] = odd_part(int(p["width"]))
                p["table"] = self._keep(hartley(int(p["odd"])))
        if w.config.rotated_head:
            s["head_odd"] = odd_part(w.config.hidden_size)
            s["head_table"] = self._keep(hartley(int(s["head_odd"])))
        if w.config.embedding_norm:
            s["first_norm"] = self._keep(w.norm("embedding_norm"))

    def _buffers(self) -> None:
        c, s, p = self.weights.config, self.state, self.products
        wide = max(*p["width"], c.hidden_size + c.gate_width)

        def floats(width: int) -> np.ndarray:
            return aligned((CHUNK, width), np.float32)

        self.ids = aligned((CHUNK,), np.int32)
        self.positions, self.caches = (aligned((CHUNK,), np.int64) for _ in range(2))
        self.gates = aligned((CHUNK,), np.float32)
        self.draft_counts, self.draft_of = (aligned((CHUNK,), np.int64) for _ in range(2))
        self.order, self.depths = (aligned((CHUNK,), np.int64) for _ in range(2))
        self.x, self.mid, self.y = (floats(c.hidden_size) for _ in range(3))
        self.qkv, self.attended = floats(int(p["rows"][QKV])), floats(c.attention_size)
        self.up, self.act = floats(int(p["rows"][UP])), floats(c.intermediate_size)
        self.input = floats(int(wide))
        widest = int(max(*p["padded"], -(-c.hidden_size // 64) * 64))
        if self._floats():  # take codes' place
            widest = max(widest, 4 * int(wide))
        codes = aligned((CHUNK, widest), np.int8)
        for name, array in {
            "ids": self.ids, "positions": self.positions, "caches": self.caches,
            "gates": self.gates, "draft_counts": self.draft_counts, "draft_of": self.draft_of,
            "order": self.order, "depths": self.depths,
            "x": self.x, "mid": self.mid, "y": self.y, "qkv": self.qkv,
            "attended": self.attended, "up": self.up, "act": self.act, "input": self.input,
            "codes": codes,
            "steps": aligned((CHUNK,), np.float32), "sums": aligned((CHUNK,), np.int32),
            "code_norms": aligned((CHUNK,), np.float32),
            "band_bounds": aligned((CHUNK, -(-c.vocab_size // BAND)), np.float32, zeros=False),
            "least_contenders": aligned((CHUNK,), np.float32),
        }.items():  # fmt: skip
            s[name] = self._keep(array)
        self.logits = aligned((MOST + 1, c.vocab_size), np.float32, zeros=False)
        """f32 [MOST + 1, V]: of one token, a draft, or a round of speculation."""
        self.logits_at = self.logits.ctypes.data
        s["input_stride"], s["codes_stride"] = self.input.strides[0], codes.strides[0]
        for index, array in ((QKV, self.qkv), (OUT, self.y), (UP, self.up), (DOWN, self.y)):
            p[index]["out"], p[index]["out_stride"] = array.ctypes.data, array.strides[0]

    def _scratch(self, threads: int, share_from: int) -> None:
        """Each thread's own: [floats | unpacked rows | int32 sums], each from a cache line on."""
        c, s, p = self.weights.config, self.state, self.products
        padded, seen = int(s["head_padded"]), -(-c.max_position_embeddings // LANES) * LANES
        partial = (LEVELS + 1) * (int(s["value_width"]) + LANES)
        longest = max(*p["width"], c.hidden_size, c.attention_size, c.intermediate_size)
        floats = max(
            1 << (c.vocab_size - 1).bit_length(),  # confidence
            1 << (int(longest) - 1).bit_length(),  # tree sums
            QUERIES * (seen + LANES + padded + partial)  # attention
            + LANES * int(s["value_width"]),
            -(-int8_scratch(seen, c.head_dim, int(s["value_width"])) // 4),
        )
        unpacked = -(-4 * floats // 64) * 64
        room = max(BAND * int(p["padded"].max()), LEAST_ROOM)
        if self._floats():
            room = max(room, -(-float_room(int(longest)) // 64) * 64)
        acc = unpacked + room
        stride = acc + (CHUNK + 8) * BAND * 4  # a kernel may write tokens behind the last
        s["scratch"] = self._keep(aligned((threads * stride,), np.uint8))
        s["scratch_stride"], s["unpacked"], s["acc"] = stride, unpacked, acc
        self.sync = aligned((sync_words(threads),), np.int64)
        s["sync"] = self._keep(self.sync)
        s["helpers"], s["share_from"] = threads - 1, share_from

    def _floats(self) -> bool:
        """Whether rows of floats are multiplied."""
        c = self.weights.config
        return c.linear == "float32" or c.head_format not in HEAD_BITS

    def _keep(self, array: np.ndarray) -> int:
        """Keep the array as long as this workspace; its address."""
        self._arrays.append(array)
        return int(array.ctypes.data)

    # ---- what changes from call to call ---------------------------------------------

    def set_tokens(self, ids: Sequence[int] | np.ndarray, cache: KVCache, position: int) -> None:
        """The tokens at hand, from `position` of the cache on."""
        if len(ids) == 1:
            self.ids[0], self.positions[0], self.caches[0] = ids[0], position, cache.at
        else:
            self.ids[: len(ids)] = ids
            self._follow(cache.at, position, len(ids))
        self.window(0, len(ids))

    def set_rows(self, runs: Sequence[Run]) -> None:
        """One token of each run."""
        count = len(runs)
        self.ids[:count] = [run.ids[0] for run in runs]
        self.positions[:count] = [run.first for run in runs]
        self.caches[:count] = [run.cache.at for run in runs]
        self.window(0, count)

    def window(self, first: int, count: int) -> None:
        """Calls are about `count` of the tokens at hand, from number `first` on."""
        ROWS.pack_into(self._bytes, ROWS_AT, count, first)

    def arrange(self, order: list[int] | np.ndarray) -> None:
        """Have the tokens of these numbers at hand, in that order."""
        for array in (self.x, self.positions, self.caches):
            array[: len(order)] = array[order]

    def _follow(self, cache_at: int, position: int, count: int) -> None:
        """`count` positions of one cache, one after the other."""
        self.positions[:count] = range(position, position + count)
        self.caches[:count] = cache_at

    @property
    def tokens(self) -> int:
        """How many tokens are at hand."""
        return self._words[TOKENS]

    @property
    def from_row(self) -> int:
        """The number of the first of them."""
        return self._words[FROM_ROW]

    def exit(self, n: int) -> tuple[int, ...]:
        """What EXIT_ROW is after n blocks: the same for all that share norm and head and have no
        block of their own."""
        if n not in self._exits:
            norm, head = self.weights.config.exit_names(n)
            rows, scales = self.weights.head(head)
            self._exits[n] = (
                self.weights.norm(norm).ctypes.data, scales.ctypes.data,
                *self.weights.exit_block(n), rows.ctypes.data, rows.strides[0],
            )  # fmt: skip
        return self._exits[n]

    def upper(self, n: int) -> tuple[int, ...] | None:
        """What UPPER_ROW is after n blocks; None where its head is read whole."""
        if n not in self._uppers:
            norm, head = self.weights.config.exit_names(n)
            upper = self.weights.upper(head)
            if upper:
                self.state["contend"] = KERNELS.piece("contend")
            self._uppers[n] = upper and (
                upper.tiles.ctypes.data, upper.tiles.strides[0], upper.norms.ctypes.data,
                upper.codes.ctypes.data, self.weights.norm(norm).ctypes.data,
                upper.scales.ctypes.data, *self.weights.exit_block(n),
            )  # fmt: skip
        return self._uppers[n]

    def set_exit(self, n: int, logits_at: int, first: int = 0) -> None:
        """Logits after n blocks of the tokens from `first` on go there, f32 [T - first, V]."""
        EXIT_ROW.pack_into(self._bytes, EXIT_AT, *self.exit(n))
        self.set_logits(logits_at, first)

    def set_contenders(
        self, n: int, logits_at: int, first: int, contenders: Contenders | None
    ) -> int:
        """As `set_exit`, where some logits may be -inf (SPEC 9.6): the action that gives them.

        That is EXIT where a head in two parts would not pay: it did not the last time.
        """
        upper = self.upper(n) if contenders else None
        if self._words[FOUND] * REREAD > self._vocab:
            self._words[FOUND], self._whole = 0, self._next_whole
            self._next_whole = min(8 * self._next_whole + 7, MOST_WHOLE)
        elif self._words[FOUND]:
            self._next_whole = WHOLE
        if contenders is None or upper is None or self._whole:
            self._whole -= self._whole > 0
            self.set_exit(n, logits_at, first)
            return EXIT
        UPPER_ROW.pack_into(self._bytes, UPPER_AT, *upper)
        CONTENDERS.pack_into(
            self._bytes, CONTENDERS_AT, contenders.count, contenders.temperature, contenders.reach
        )
        self.set_logits(logits_at, first)
        return CONTEND

    @property
    def reads_whole(self) -> bool:
        """Whether contenders did not pay, so that heads in two parts are read whole for now."""
        return self._whole > 0

    def set_logits(self, logits_at: int, first: int = 0) -> None:
        """Where the logits of the tokens from `first` on are to be, or are to be measured."""
        LOGITS.pack_into(self._bytes, LOGITS_AT, logits_at, first)

    def set_draft(self, draft: Draft, counts: Sequence[int], least_lead: float) -> None:
        """At most so many drafts behind each token at hand (SPEC 11.1), at the exit as set.

        Counts must not fall.
        """
        self.draft_counts[: len(counts)] = counts
        vocab = draft.vocab or self.weights.config.vocab_size
        DRAFT_ROW.pack_into(self._bytes, DRAFT_AT, vocab, bounded(least_lead))

    def drafts_in_order(self) -> np.ndarray:
        """Have each token that was drafted behind the one before it; whose each is, int64 [T]."""
        of = self.draft_of[: self.tokens]
        order = np.argsort(of, kind="stable")
        self.arrange(order)
        self.ids[: len(order)] = self.ids[order]
        return of[order]

    def measures(self) -> None:
        """Have the piece `measure`."""
        self.state["measure"] = KERNELS.piece("measure")

    def set_gate(self, n: int) -> None:
        """The gate of block n, counted from 1."""
        self._words[GATE] = self.weights.gate_at(n)

    def set_looks(self, looks: tuple[int, ...], deepest: int, threshold: float) -> bool:
        """After which blocks a token at hand is to stop if its gate exceeds a threshold.

        Returns whether logits are the same function after each of them and after the deepest.
        """
        if self._looks != (looks, deepest, threshold):
            self._looks = None  # until all of it is set: Ctrl-C may come between
            self._one_exit = all(self.exit(n) == self.exit(deepest) for n in looks)
            self._gates[:] = 0
            for n in looks:
                self._gates[n - 1] = self.weights.gate_at(n)
            self.state["threshold"] = at_most(threshold)
            self._looks = looks, deepest, threshold
        return self._one_exit

    def looked_up(self, count: int) -> None:
        """So many tokens were looked up in `sparse`, which is given back from time to time.

        With each row the system maps what lies around it, 1 or 2 MB: soon all of it would take
        memory beside the head's tiles.
        """
        self._looked_up += count
        if self.sparse is not None and self._looked_up >= LOOKED_UP:
            self._looked_up = 0
            give_back(self.sparse)

    @property
    def stopped(self) -> int:
        """Blocks that the first token ran, up to the look that stopped it."""
        return int(self.depths[0])

    # ---- what a call has left behind (bitskip_ref.engine.Trace) -----------------------

    def embedded(self) -> dict[str, np.ndarray]:
        return {"embed": self.x[: self.state["tokens"]]}

    def block_stages(self, i: int) -> dict[str, np.ndarray]:
        """Views of block i's stages, in forward order."""
        c, tokens = self.weights.config, int(self.state["tokens"])
        q, k, v = np.split(self.qkv[:tokens], (c.attention_size, c.attention_size + c.kv_size), 1)
        stages = {
            "q": q.reshape(tokens, -1, c.head_dim), "k": k.reshape(tokens, -1, c.head_dim),
            "v": v.reshape(tokens, -1, c.head_dim), "attn": self.attended[:tokens],
            "mid": self.mid[:tokens], "act": self.act[:tokens], "out": self.x[:tokens],
        }  # fmt: skip
        return {f"layers.{i}.{name}": value for name, value in stages.items()}

    def exit_stages(self, n: int, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Views of the stages of exit n, f32 [t, V] the logits that were made."""
        count, stages = len(logits), dict[str, np.ndarray]()
        if n in self.weights.config.exit_blocks:
            at = f"exits.{n}.block"
            stages = {f"{at}.act": self.act[:count], f"{at}.out": self.mid[:count]}
        return stages | {"exit_norm": self.input[:count, : self.x.shape[1]], "logits": logits}
