"""A model folder, cut at an exit, as other programs are given it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bitskip_export.foreign.source import VOCABULARY, Report
from bitskip_export.pack import CHUNK
from bitskip_ref.arithmetic.hadamard import rotate_unpadded
from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.exits.fixed import check_exit_layer
from bitskip_ref.floats import widened
from bitskip_ref.folder import Folder
from bitskip_ref.packing import unpack_ternary
from bitskip_ref.tensors import HEAD_DTYPES, parameter_shapes


@dataclass(frozen=True)
class Given:
    """Blocks 1..N of a model with the norm and head of exit N: a plain model without exits."""

    folder: Folder
    config: ModelConfig  # of N blocks, exits shared, no gates; int8 layers as floats
    names: dict[str, str]  # FORMAT 3's names in this model -> in the folder
    dropped: tuple[str, ...]

    def rows(self, name: str, first: int, end: int) -> np.ndarray:
        """Values of a float or integer tensor as f32 [end - first, ...] (SPEC 4.4, 4.8).

        Rows that were turned (SPEC 5.3, 5.4) are turned back, so that they fit plain inputs.
        """
        stored, full = self.names[name], self.folder.config
        part = widened(self.folder.tensors[stored][first:end])
        linear = name.endswith("_proj.weight") and full.linear == "int8"
        if linear or (full.head_format in HEAD_BITS and name in VOCABULARY):
            scales = self.folder.tensors[stored.removesuffix("weight") + "scale"]
            part *= scales[first:end, None]
            if full.hadamard if linear else full.rotated_head:
                part = rotate_unpadded(part)
        return part

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """`rows` from the first to the last, some thousand at a time."""
        count = len(self.folder.tensors[self.names[name]])
        for first in range(0, count, CHUNK):
            yield self.rows(name, first, min(first + CHUNK, count))

    def codes(self, name: str) -> np.ndarray:
        """A ternary matrix, int8 [out, in] in -1..1."""
        width = self.config.linear_shapes()[name.split(".")[2]][1]
        return unpack_ternary(self.folder.tensors[self.names[name]], width)

    def alpha(self, name: str) -> np.float32:
        """Its scale (SPEC 4.1)."""
        stored = self.names[name].removesuffix("weight") + "scale"
        return np.float32(self.folder.tensors[stored][0])

    def report(self, activations: str) -> Report:
        """What becomes of it as a model of another program.

        activations: what that does with those of ternary layers; nothing where it keeps them.
        """
        full = self.folder.config
        kept, converted = list[str](), list[str]()
        if full.linear == "int8":
            converted.append(
                "linear weights: int8 rows as the float32 that they stand for; activations are not "
                "quantized there"
            )
        else:
            ternary = full.linear == "ternary"
            kept.append("linear weights: " + ("codes and scales" if ternary else "float32"))
        if full.head_format in HEAD_BITS:
            converted.append(
                f"embedding and head: {full.head_format} rows as the float32 that they stand for; "
                "the head's input is not quantized there"
            )
        else:
            kept.append("embedding and head")
        if full.linear == "ternary" and activations:
            converted.append(f"activations: {activations}")
        return Report(tuple(kept), tuple(converted), self.dropped)

    def written_kind(self, name: str) -> type:
        """The dtype of floats there: embedding and head keep float16 and BFLOAT16."""
        floats = self.config.head_format not in HEAD_BITS
        if floats and name in VOCABULARY:
            return HEAD_DTYPES[self.config.head_format]
        return np.float32


def at_exit(folder: Folder, exit_layer: int | None) -> Given:
    """The model that stops after `exit_layer` blocks; None: after all.

    Raises ValueError for an exit out of range, or one with a block of its own (SPEC 8.8).
    """
    full = folder.config
    n = check_exit_layer(exit_layer, full)
    if n in full.exit_blocks:
        raise ValueError(
            f"exit {n} has a block of its own, without attention, which other programs do not "
            "run: give another exit layer, or none for full depth"
        )
    config = full.replace(
        num_hidden_layers=n, gates=False, exit_norm="shared", exit_head="shared", exit_blocks=()
    )
    if config.linear == "int8":
        kept = "float32" if config.head_format in HEAD_BITS else config.head_format
        config = config.replace(linear="float32", hadamard=False, head_format=kept)
    norm, head = full.exit_names(n)
    table = {name: name for name in parameter_shapes(config)}
    for name in table:
        if name.startswith("final_norm."):
            table[name] = norm + name.removeprefix("final_norm")
        elif name == "lm_head.weight":
            table[name] = f"{head}.weight"
    dropped = []
    if n < full.num_hidden_layers:
        dropped.append(f"blocks {n + 1} to {full.num_hidden_layers}: exported is exit {n}")
    if full.gates:
        dropped.append("routing gates")
    if "per_layer" in (full.exit_norm, full.exit_head) and n > 1:
        dropped.append(f"norms and heads of exits other than {n}")
    if full.exit_blocks:
        dropped.append(f"blocks of exits: {', '.join(map(str, full.exit_blocks))}")
    if folder.auto_exit is not None:
        dropped.append("the calibrated exit")
    return Given(folder, config, table, tuple(dropped))
