"""Which tensors a model has: their names, dtypes, shapes and values (FORMAT 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.excerpt import shown
from bitskip_ref.floats import BFLOAT16, all_finite, dtype_name
from bitskip_ref.packing import IllegalCodeError, check_codes, packed_width

WEIGHTS = "model.safetensors"
HEAD_DTYPES: dict[str, type] = {
    **dict.fromkeys(HEAD_BITS, np.int8), "float32": np.float32, "float16": np.float16,
    "bfloat16": BFLOAT16,
}  # fmt: skip


class FormatError(ValueError):
    """A model folder that breaks FORMAT; the message names the file and the rule."""


def expected_tensors(config: ModelConfig) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor, in file order (FORMAT 3)."""
    blocks = range(config.num_hidden_layers)
    table: dict[str, tuple[type, tuple[int, ...]]] = {}
    linears = linear_layers(config)
    for name, (rows, width) in linears.items():
        table[f"{name}.weight"] = {
            "ternary": (np.uint8, (rows, packed_width(width))),
            "int8": (np.int8, (rows, width)),
            "float32": (np.float32, (rows, width)),
        }[config.linear]
    heads = ["embed_tokens"] + ([] if config.tie_word_embeddings else ["lm_head"])
    exits = range(1, config.num_hidden_layers)
    if config.exit_head == "per_layer":
        heads += [f"exits.{n}.head" for n in exits]
    for name in heads:
        shape = (config.vocab_size, config.hidden_size)
        table[f"{name}.weight"] = (HEAD_DTYPES[config.head_format], shape)
    if config.linear != "float32":
        for name, (rows, _) in linears.items():
            scales = 1 if config.linear == "ternary" else rows
            table[f"{name}.scale"] = (np.float32, (scales,))
    if config.head_format in HEAD_BITS:
        for name in heads:
            table[f"{name}.scale"] = (np.float32, (config.vocab_size,))

    def norm(name: str, width: int, biased: bool = config.norm == "layer") -> None:
        table[f"{name}.weight"] = (np.float32, (width,))
        if biased:
            table[f"{name}.bias"] = (np.float32, (width,))

    if config.embedding_norm:
        norm("embedding_norm", config.hidden_size)
    for i in blocks:
        for name, width in config.bias_shapes().items():
            table[f"layers.{i}.{name}.bias"] = (np.float32, (width,))
        for name, width in config.norm_shapes().items():
            norm(f"layers.{i}.{name}", width)
        if config.gates:
            norm(f"layers.{i}.gate.norm", config.hidden_size, biased=True)
            inner = (config.gate_width, config.hidden_size)
            table[f"layers.{i}.gate.fc1.weight"] = (np.float32, inner)
            table[f"layers.{i}.gate.fc2.weight"] = (np.float32, (1, config.gate_width))
    for n in config.exit_blocks:
        for name, width in config.exit_block_norms().items():
            norm(f"exits.{n}.block.{name}", width)
    if config.exit_norm == "per_layer":
        for n in exits:
            norm(f"exits.{n}.norm", config.hidden_size)
    norm("final_norm", config.hidden_size)
    return table


def linear_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of the linear layers of all blocks, then of all exit blocks."""
    blocks = {
        f"layers.{i}.{name}": shape
        for i in range(config.num_hidden_layers)
        for name, shape in config.linear_shapes().items()
    }
    return blocks | {
        f"exits.{n}.block.{name}": shape
        for n in config.exit_blocks
        for name, shape in config.exit_block_shapes().items()
    }


def tensor_count(config: ModelConfig) -> int:
    """How many tensors `expected_tensors` has, without its table."""
    if config.num_hidden_layers <= 2:
        return len(expected_tensors(config))
    plain = config.replace(exit_blocks=())
    one, two = (len(expected_tensors(plain.replace(num_hidden_layers=n))) for n in (1, 2))
    with_one = expected_tensors(plain.replace(num_hidden_layers=2, exit_blocks=(1,)))
    exit_blocks = len(config.exit_blocks) * (len(with_one) - two)
    return one + (config.num_hidden_layers - 1) * (two - one) + exit_blocks


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the full-precision parameters that training holds: no scales, no packing."""
    shapes = {name: s for name, (_, s) in expected_tensors(config).items() if ".scale" not in name}
    return shapes | {f"{name}.weight": shape for name, shape in linear_layers(config).items()}


def checked_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The tensors in file order, each asked for once and checked when its turn comes.

    Raises FormatError at once unless the names are those of the config, and at a tensor whose
    dtype, shape or values are not.
    """
    expected = expected_tensors(config)
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has an unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise FormatError(
                f"{WEIGHTS} {problem} tensor {shown(min(names))} ({len(names)} in all)"
            )

    def check(name: str) -> np.ndarray:
        tensor = tensors[name]
        _check(config, name, tensor, *expected[name])
        return tensor

    return map(check, expected)


def _check(
    config: ModelConfig, name: str, t: np.ndarray, kind: type, shape: tuple[int, ...]
) -> None:
    if t.dtype != kind or t.shape != shape:
        raise FormatError(
            f"{WEIGHTS}: {name} is {dtype_name(t.dtype)}{list(t.shape)}, "
            f"the config asks for {dtype_name(kind)}{list(shape)}"
        )
    if kind is np.uint8:
        try:
            check_codes(t)
        except IllegalCodeError as error:
            raise FormatError(f"{WEIGHTS}: {name}: {error}") from None
    elif kind is np.int8:
        form = "int8" if name.endswith("_proj.weight") else config.head_format
        largest = 2 ** (HEAD_BITS[form] - 1) - 1
        if t.size and (t.min() < -largest or t.max() > largest):
            worst = t.min() if t.min() < -largest else t.max()
            raise FormatError(
                f"{WEIGHTS}: {name} holds the illegal {form} code {worst}: "
                f"codes lie in -{largest}..{largest}"
            )
    elif not all_finite(t):
        raise FormatError(f"{WEIGHTS}: {name} holds a value that is not finite")
