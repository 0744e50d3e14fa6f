"""A model's tensors as the kernels read them. Packed weights stay where they are mapped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bitskip_cpu.kernels.layout import DOWN, OUT, PRODUCT, QKV, UP
from bitskip_cpu.kernels.linear import ACTIVATION_OFFSET
from bitskip_ref.config import ModelConfig
from bitskip_ref.folder import expected_tensors
from bitskip_ref.packing import GROUP, packed_width

Tensors = Mapping[str, np.ndarray]

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


class Weights:
    """Arrays in the kernels' layout; `products` is filled but for the workspace addresses."""

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        """`tensors` as in a model folder, already checked (bitskip_ref.folder.check_tensors)."""
        self.config = config
        self.tensors = tensors
        shapes = config.linear_shapes()
        blocks = range(config.num_hidden_layers)
        self.linear = in_a_row([tensors[f"layers.{i}.{n}.weight"] for i in blocks for n in shapes])
        self._norms: dict[str, np.ndarray] = {}
        self._heads: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.products = self._products()
        self.norm_offsets, self.params = self._params()

    def _products(self) -> np.ndarray:
        c, shapes = self.config, self.config.linear_shapes()
        names = list(shapes)
        table = np.zeros(4, PRODUCT)
        offset = 0
        for index, members in (
            (QKV, ["q_proj", "k_proj", "v_proj"]),
            (OUT, ["o_proj"]),
            (UP, ["gate_proj", "up_proj"] if c.gated else ["up_proj"]),
            (DOWN, ["down_proj"]),
        ):
            p = table[index]
            ends = np.cumsum([shapes[n][0] for n in members])
            width = shapes[members[0]][1]
            p["weights"], p["rows"], p["width"] = offset, ends[-1], width
            p["source"] = dict(zip((QKV, UP, OUT, DOWN), (
                c.hidden_size, c.hidden_size, c.attention_size, c.intermediate_size,
            ), strict=True))[index]  # fmt: skip
            p["row_bytes"] = packed_width(width) if c.linear == "ternary" else 4 * width
            p["padded"] = -(-width // GROUP) * GROUP
            p["alphas"] = names.index(members[0])
            p["end0"], p["end1"] = ends[0], ends[min(1, len(ends) - 1)]
            offset += p["rows"] * p["row_bytes"]
        self.layer_bytes = int(offset)
        return table

    def _params(self) -> tuple[dict[str, int], np.ndarray]:
        """Per block: weight scales, then each norm's weight and bias. -> (byte offsets, [L, P])."""
        c, t = self.config, self.tensors
        offsets, size = {}, SCALES
        for name, width in c.norm_shapes().items():
            offsets[name] = 4 * size
            size += width * (2 if c.norm == "layer" else 1)
        table = np.zeros((c.num_hidden_layers, size), np.float32)
        for i, row in enumerate(table):
            if c.linear == "ternary":
                scales = [t[f"layers.{i}.{name}.scale"] for name in c.linear_shapes()]
                row[: len(scales)] = np.concatenate(scales)
            for name, start in offsets.items():
                values = self.norm(f"layers.{i}.{name}")
                row[start // 4 : start // 4 + values.size] = values
        return offsets, table

    def norm(self, name: str) -> np.ndarray:
        """Weight, and behind it the bias if there is one, f32 [n] or [2n]; made once."""
        if name not in self._norms:
            parts = [f"{name}.{part}" for part in ("weight", "bias")]
            self._norms[name] = np.concatenate(
                [self.tensors[p] for p in parts if p in self.tensors]
            )
        return self._norms[name]

    def head(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, scales f32 [V], corrections int32 [V]); the last two empty unless int8.

        int8 rows of a width that is no multiple of 64 are padded with zeros (a copy). The
        correction undoes ACTIVATION_OFFSET: offset times the row's sum.
        """
        if name not in self._heads:
            self._heads[name] = self._head(name)
        return self._heads[name]

    def _head(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self.tensors[f"{name}.weight"]
        if self.config.head_format != "int8":
            return rows, np.zeros(0, np.float32), np.zeros(0, np.int32)
        missing = -rows.shape[1] % 64
        if missing:
            rows = np.pad(rows, ((0, 0), (0, missing)))
        sums = np.zeros(len(rows), np.int32)
        if ACTIVATION_OFFSET:
            for start in range(0, len(rows), 4096):  # bounded scratch
                part = rows[start : start + 4096]
                sums[start : start + 4096] = part.sum(axis=1, dtype=np.int32)
        return rows, self.tensors[f"{name}.scale"], sums * np.int32(ACTIVATION_OFFSET)

    def exit(self, n: int) -> tuple[str, str]:
        """Names of the norm and the head after n blocks (SPEC 8.1)."""
        c = self.config
        early = n < c.num_hidden_layers
        norm = f"exits.{n}.norm" if early and c.exit_norm == "per_layer" else "final_norm"
        if early and c.exit_head == "per_layer":
            return norm, f"exits.{n}.head"
        return norm, "embed_tokens" if c.tie_word_embeddings else "lm_head"


def random_tensors(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Tensors of any shape with plausible random values, made at about memory speed.

    Ternary weights are even over -1, 0, 1 (nearly); float matrices repeat one random block.
    """
    rng = np.random.default_rng(seed)
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
            values = np.empty(shape, kind)
        flat = values.reshape(-1)
        if kind is np.uint8:
            np.take(translate, rng.integers(0, 256, flat.size, np.uint8), out=flat)
        elif kind is np.int8:
            for first in range(0, flat.size, 1 << 20):  # bounded scratch
                part = flat[first : first + (1 << 20)]
                part[:] = rng.integers(-127, 128, part.size, np.int8)
        elif name.endswith(".scale"):
            flat[:] = rng.uniform(0.5, 1.5, flat.size) * (0.02 if "_proj" in name else 2e-3)
        elif len(shape) == 1:
            flat[:] = 0.1 * rng.standard_normal(flat.size) + name.endswith(".weight")
        else:
            for first in range(0, flat.size, noise.size):
                part = flat[first : first + noise.size]
                np.multiply(noise[: part.size], 0.02, out=part, casting="unsafe")
        tensors[name] = values
    return tensors
