"""A model's tensors as the kernels read them.

Ternary weights are copied into tiles (`kernels/products/ternary_layout.py`) when a model is loaded,
integer heads (`vocab_layout.py`) when first used, and what was mapped of them is given back;
everything else stays where it is mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.compiling import KERNELS
from bitskip_cpu.cores import default_threads
from bitskip_cpu.kernels.layout import DOWN, OUT, PRODUCT, PRODUCTS, QKV, UP
from bitskip_cpu.kernels.products import ternary_layout, vocab_layout
from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.constants import SCALE_FLOOR
from bitskip_ref.floats import stored
from bitskip_ref.packing import packed_width
from bitskip_ref.safetensors_file import give_back
from bitskip_ref.tensors import expected_tensors

Tensors = Mapping[str, np.ndarray]

PACK_ROWS = 1024  # of a head, packed together
LARGE = 16 << 20  # bytes of tiles that take more time to make than threads to start
LEAST_UPPER = 8 << 20  # weights of a head from which reading it in two parts pays
WIDEST_UPPER = 1 << 15  # columns: twice a sum and its bound fit int32 (kernels/contenders.py)
SCALES = 8  # floats kept for the weight scales of a block


def in_a_row(tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The tensors' memory as one array of bytes: a view if they follow each other, else a copy."""
    end = tensors[0].ctypes.data
    for t in tensors:
        if not t.flags.c_contiguous or t.ctypes.data != end:
            return np.concatenate([np.ascontiguousarray(t).reshape(-1).view(np.uint8)
                                   for t in tensors])  # fmt: skip
        end += t.nbytes
    base = tensors[0].reshape(-1).view(np.uint8)
    size = end - tensors[0].ctypes.data
    return np.lib.stride_tricks.as_strided(base, (size,), (1,), writeable=False)


def in_parallel(work: Callable[[int], None], items: Iterable[int], size: int) -> None:
    """work(item) for each, on all cores if `size` bytes are LARGE."""
    if size < LARGE:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(work, items))


def _int8_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [rows, width] -> codes int8, scales f32 [rows] (SPEC 4.4)."""
    s = np.maximum(np.abs(w).max(1), np.float32(SCALE_FLOOR))
    codes = np.rint(w * (np.float32(127.0) / s)[:, None]).astype(np.int8)
    return codes, s / np.float32(127.0)


class Upper(NamedTuple):
    """A head in two parts (SPEC 9.6): the upper 4 bits of all rows, and the rows themselves."""

    tiles: np.ndarray  # uint8, `vocab_layout.pack_upper`
    norms: np.ndarray  # f32 [V] of what the upper bits leave
    codes: np.ndarray  # int8 [V, D]
    scales: np.ndarray  # f32 [V]


class Weights:
    """Arrays in the kernels' layout; `products` is filled but for the workspace addresses.

    Several engines may use the same.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        """`tensors` as in a model folder, already checked (bitskip_ref.tensors.checked_tensors)."""
        self.config = config
        members = self._members()
        blocks = [
            {p: [tensors[f"layers.{i}.{n}.weight"] for n in names] for p, names in members.items()}
            for i in range(config.num_hidden_layers)
        ]
        blocks += [
            {p: [tensors[f"exits.{e}.block.{n}.weight"] for n in members[p]] for p in (UP, DOWN)}
            for e in config.exit_blocks
        ]
        linear = {id(t) for block in blocks for product in block.values() for t in product}
        self.tensors = {name: t for name, t in tensors.items() if id(t) not in linear}
        self._norms: dict[str, np.ndarray] = {}
        self._gates: dict[int, tuple[int, np.ndarray]] = {}  # addresses, and what lies there
        self._heads: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._uppers: dict[str, Upper | None] = {}
        self.products = self._products()
        self.norm_offsets, self.params = self._params()
        if config.linear != "float32":
            self.linear = self._tiles(blocks)
        else:
            whole = [t for block in blocks for product in block.values() for t in product]
            self.linear = in_a_row(whole)

    def _members(self) -> dict[int, list[str]]:
        """The linear layers that each product consists of."""
        return {
            QKV: ["q_proj", "k_proj", "v_proj"],
            OUT: ["o_proj"],
            UP: ["gate_proj", "up_proj"] if self.config.gated else ["up_proj"],
            DOWN: ["down_proj"],
        }

    def _tiles(self, blocks: Sequence[Mapping[int, Sequence[np.ndarray]]]) -> np.ndarray:
        """The rows of every block and exit block as tiles, uint8 [bytes]; made on all cores."""
        result = aligned((self._start(len(blocks)),), np.uint8, zeros=False)
        widest = max(
            max(int(p["padded"]), 4 * packed_width(int(p["width"]))) for p in self.products
        )

        def pack_rows(i: int) -> None:
            for product, members in blocks[i].items():
                p, at = self.products[product], self._place(i, product)
                rows, size = ternary_layout.padded_rows(int(p["rows"])), int(p["row_bytes"])
                tiles = result[at : at + rows * size].reshape(rows, size)
                vocab_layout.pack(np.concatenate(members), 8, tiles)
                for t in members:
                    give_back(t)

        def repack(i: int) -> None:
            scratch = np.empty(32 * (widest + 64) + 512, np.uint8)
            for product, members in blocks[i].items():
                packed, p = in_a_row(members), self.products[product]
                to = result.ctypes.data + self._place(i, product)
                KERNELS.repack(
                    packed.ctypes.data, packed_width(int(p["width"])), int(p["rows"]),
                    int(p["units"]), int(p["tail"]), to, scratch.ctypes.data,
                )  # fmt: skip
                for t in members:
                    give_back(t)

        make = repack if self.config.linear == "ternary" else pack_rows
        in_parallel(make, range(len(blocks)), result.nbytes)
        return result

    def _start(self, i: int) -> int:
        """Where block i begins in `linear`; exit blocks come behind the blocks, as in FORMAT 3."""
        layers = self.config.num_hidden_layers
        return min(i, layers) * self.layer_bytes + max(0, i - layers) * self.exit_bytes

    def _place(self, i: int, product: int) -> int:
        """Where a product of block i begins in `linear`; an exit block has only UP and DOWN."""
        skipped = 0 if i < self.config.num_hidden_layers else int(self.products[UP]["weights"])
        return self._start(i) + int(self.products[product]["weights"]) - skipped

    def exit_block(self, n: int) -> tuple[int, int]:
        """`exit_layer` and `exit_weights` (`layout.STATE`) of the exit after n blocks."""
        if n not in self.config.exit_blocks:
            return 0, 0
        i = self.config.num_hidden_layers + self.config.exit_blocks.index(n)
        base = self._place(i, UP) - int(self.products[UP]["weights"]) - i * self.layer_bytes
        return i, self.linear.ctypes.data + base

    def _products(self) -> np.ndarray:
        c, shapes = self.config, self.config.linear_shapes()
        names = list(shapes)
        table = np.zeros(PRODUCTS, PRODUCT)
        offset = 0
        for index, members in self._members().items():
            p = table[index]
            ends = np.cumsum([shapes[n][0] for n in members])
            width = shapes[members[0]][1]
            p["weights"], p["rows"], p["width"] = offset, ends[-1], width
            p["source"] = dict(zip((QKV, UP, OUT, DOWN), (
                c.hidden_size, c.hidden_size, c.attention_size, c.intermediate_size,
            ), strict=True))[index]  # fmt: skip
            p["units"], p["tail"] = ternary_layout.units(width), ternary_layout.tail_lines(width)
            p["padded"] = ternary_layout.padded_width(width)
            p["row_bytes"] = 4 * width
            rows = int(p["rows"])
            if c.linear == "ternary":
                p["row_bytes"] = ternary_layout.tile_bytes(width) // ternary_layout.TILE_ROWS
                rows = ternary_layout.padded_rows(rows)
            elif c.linear == "int8":
                p["padded"] = p["row_bytes"] = vocab_layout.row_bytes(width, 8)
                rows = ternary_layout.padded_rows(rows)
            before = names[: names.index(members[0])]
            p["alphas"] = sum(shapes[n][0] if c.linear == "int8" else 1 for n in before)
            p["end0"], p["end1"] = ends[0], ends[min(1, len(ends) - 1)]
            offset += rows * int(p["row_bytes"])
        self.layer_bytes = int(offset)
        self.exit_bytes = self.layer_bytes - int(table[UP]["weights"])
        return table

    def _params(self) -> tuple[dict[str, int], np.ndarray]:
        """Per block: weight scales, biases, each norm's weight and bias; exit blocks come behind.

        -> (byte offsets of the norms, f32 [L + exit blocks, P]).
        """
        c, t = self.config, self.tensors
        scales = sum(out for out, _ in c.linear_shapes().values()) if c.linear == "int8" else SCALES
        offsets, size, biases = {}, scales, {}
        for index, members in self._members().items():
            for name in members:
                if name in c.bias_shapes():
                    biases[name] = size
                    size += c.bias_shapes()[name]
            if members[0] in biases:
                self.products[index]["bias"] = 4 * biases[members[0]]
        for name, width in c.norm_shapes().items():
            offsets[name] = 4 * size
            size += width * (2 if c.norm == "layer" else 1)
        blocks = [f"layers.{i}" for i in range(c.num_hidden_layers)]
        blocks += [f"exits.{n}.block" for n in c.exit_blocks]
        table = np.zeros((len(blocks), size), np.float32)
        for at, row in zip(blocks, table, strict=True):
            start = 0
            for name, (out, _) in c.linear_shapes().items():
                count = {"ternary": 1, "int8": out, "float32": 0}[c.linear]
                if count and f"{at}.{name}.scale" in t:
                    row[start : start + count] = t[f"{at}.{name}.scale"]
                start += count
            for name, start in biases.items():
                values = t.get(f"{at}.{name}.bias", row[:0])
                row[start : start + values.size] = values
            for name, start in offsets.items():
                if f"{at}.{name}.weight" in t:
                    values = self.norm(f"{at}.{name}")
                    row[start // 4 : start // 4 + values.size] = values
        return offsets, table

    def norm(self, name: str) -> np.ndarray:
        """Weight, and behind it the bias if there is one, f32 [n] or [2n]; made once."""
        if name not in self._norms:
            parts = [f"{name}.{part}" for part in ("weight", "bias")]
            made = np.concatenate([self.tensors[p] for p in parts if p in self.tensors])
            self._norms.setdefault(name, made)  # another engine's thread may have been faster
        return self._norms[name]

    def gate_at(self, n: int) -> int:
        """Where the routing gate of block n, counted from 1, lies; made once (SPEC 8.4).

        In a row: its norm f32 [2 * D]; the scales f32 [W + 1] and int8 codes [W, D], [W] of its
        rows, W `gate_width`.
        """
        if n not in self._gates:
            at, t = f"layers.{n - 1}.gate", self.tensors
            first, second = (_int8_rows(t[f"{at}.{fc}.weight"]) for fc in ("fc1", "fc2"))
            parts = self.norm(f"{at}.norm"), first[1], second[1], first[0], second[0]
            made = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
            self._gates.setdefault(n, (int(made.ctypes.data), made))
        return self._gates[n][0]

    def head(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scales f32 [V]): whole numbers in tiles (vocab_layout); floats as they are."""
        if name not in self._heads:
            self._heads.setdefault(name, self._head(name))
        return self._heads[name]

    def _head(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = self.tensors[f"{name}.weight"]
        if self.config.head_format not in HEAD_BITS:
            return rows, np.zeros(0, np.float32)
        bits = HEAD_BITS[self.config.head_format]
        tiles = _in_tiles(rows, bits, lambda part, _, out: vocab_layout.pack(part, bits, out))
        return tiles, self.tensors[f"{name}.scale"]

    def upper(self, name: str) -> Upper | None:
        """A head of 8 bits in two parts; None: it has other bits, is small, or has odd scales.

        Of 6 bits the upper 4 are two thirds: what they save is less than the memory they take.
        """
        if name not in self._uppers:
            self._uppers.setdefault(name, self._upper(name))
        return self._uppers[name]

    def _upper(self, name: str) -> Upper | None:
        scales, width = self.tensors.get(f"{name}.scale"), self.config.hidden_size
        if self.config.head_format != "int8" or scales is None:
            return None
        if width > WIDEST_UPPER or len(scales) * width < LEAST_UPPER:
            return None
        if not (np.isfinite(scales).all() and (scales >= 0).all()):  # or bounds would not hold
            return None
        rows, norms = self.tensors[f"{name}.weight"], np.empty(len(scales), np.float32)

        def pack(part: np.ndarray, first: int, out: np.ndarray) -> None:
            vocab_layout.pack_upper(part, out, norms[first : first + len(part)])

        return Upper(_in_tiles(rows, 4, pack), norms, np.ascontiguousarray(rows), scales)


def _in_tiles(
    rows: np.ndarray, bits: int, pack: Callable[[np.ndarray, int, np.ndarray], None]
) -> np.ndarray:
    """Tiles of that many bits that pack(some rows, their first, tiles to be) makes of a head."""
    shape = ternary_layout.padded_rows(len(rows)), vocab_layout.row_bytes(rows.shape[1], bits)
    result = aligned(shape, np.uint8, zeros=False)

    def repack(first: int) -> None:
        part = rows[first : first + PACK_ROWS]
        pack(part, first, result[first : first + PACK_ROWS])
        give_back(part)

    in_parallel(repack, range(0, len(rows), PACK_ROWS), result.nbytes)
    return result


def random_tensors(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Tensors of any shape with plausible random values, made at about memory speed.

    Ternary weights are even over -1, 0, 1 (nearly); float matrices repeat one random block.
    """
    rng = np.random.default_rng(seed)
    largest = 2 ** (HEAD_BITS.get(config.head_format, 8) - 1) - 1
    expected = expected_tensors(config)
    linear = {n for n in expected if n.endswith("_proj.weight")}
    sizes = {n: math.prod(s) * np.dtype(k).itemsize for n, (k, s) in expected.items()}
    pool = np.empty(sum(sizes[n] for n in linear), np.uint8)  # in a row, as in a file
    legal = np.array([a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3)
                      for c in range(3) for d in range(3)], np.uint8)  # fmt: skip
    translate = legal[np.arange(256) % 81]
    noise = rng.standard_normal(1 << 16, np.float32)
    tensors: dict[str, np.ndarray] = {}
    start = 0
    for name, (kind, shape) in expected.items():
        values: np.ndarray
        if name in linear:
            values = pool[start : start + sizes[name]].view(kind).reshape(shape)
            start += sizes[name]
        else:
            values = aligned(shape, kind, zeros=False)  # as in a file
        flat = values.reshape(-1)
        if kind is np.uint8:
            np.take(translate, rng.integers(0, 256, flat.size, np.uint8), out=flat)
        elif kind is np.int8:
            for first in range(0, flat.size, 1 << 20):  # bounded scratch
                part = flat[first : first + (1 << 20)]
                part[:] = rng.integers(-largest, largest + 1, part.size, np.int8)
        elif name.endswith(".scale"):
            size = 2e-3 if "_proj" not in name else 2e-4 if config.linear == "int8" else 0.02
            flat[:] = size * rng.uniform(0.5, 1.5, flat.size)
        elif len(shape) == 1:
            flat[:] = 0.1 * rng.standard_normal(flat.size) + name.endswith(".weight")
        else:
            for first in range(0, flat.size, noise.size):
                part = flat[first : first + noise.size]
                part[:] = stored(noise[: part.size] * np.float32(0.02), kind)
        tensors[name] = values
    return tensors
