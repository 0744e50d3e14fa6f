"""First weights from a model folder, for a run that goes on from a model instead of from chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.folder import Folder
from bitskip_ref.tensors import parameter_shapes
from bitskip_text.tokenizer import Tokenizer
from bitskip_train.loaded import parameter_values

FREE = (
    "linear",
    "activation_bits",
    "max_position_embeddings",
    "head_format",
    "norm_eps",
    "vocab_size",
)
"""Settings of a model that may change: no weight's meaning depends on them, but for `_turned`."""
UNKNOWN = "\ufffd"  # what bytes that are no character decode to


def check_config(config: ModelConfig, source: ModelConfig) -> None:
    """Raise ConfigError for a setting that differs from the source's and may not."""
    mine, its = config.to_dict(), source.to_dict()
    for name, value in mine.items():
        if name not in FREE and value != its[name]:
            raise ConfigError(
                f"model.{name} = {value}: with --from it must stay {its[name]}; free are "
                f"{', '.join(FREE)}"
            )
    if _turned(config) != _turned(source):
        name = next(n for n in ("linear", "head_format") if mine[n] != its[n])
        raise ConfigError(
            f"model.{name} = {mine[name]}: with --from and hadamard = true it must stay "
            f"{its[name]}, as weights are turned otherwise there (SPEC 5.1, 5.3, 5.4); a model "
            "imported with --linear float32 is free"
        )


def _turned(config: ModelConfig) -> tuple[object, ...]:
    """What the space in which a configuration's weights lie depends on."""
    return config.rotated_head, *(config.padded(width) for width in config.linear_inputs())


def first_weights(
    config: ModelConfig, source: Folder, tokenizer: Tokenizer, old: Tokenizer
) -> dict[str, Tensor]:
    """Name -> f32 parameter of `config`, as a state dict has them, with a model folder's values.

    Codes become the numbers that they stand for. Where the source's tokenizer `old` is another,
    rows of embedding and heads are those of the same tokens; what `old` lacks gets the mean of the
    tokens that it makes of its text, or of all. `config` has a row for each token. Raises
    ConfigError as `check_config`.
    """
    check_config(config, source.config)
    shapes = parameter_shapes(source.config)
    ternary = config.linear == "ternary"
    numbers = {n: _values(source, n, ternary) for n in shapes}
    if (tokenizer.json, config.vocab_size) != (old.json, source.config.vocab_size):
        origins = token_origins(tokenizer, old)
        for name in numbers:
            if name.rpartition(".")[0].rpartition(".")[2] in ("embed_tokens", "lm_head", "head"):
                numbers[name] = carried(numbers[name], origins, config.vocab_size)
    return {name: torch.from_numpy(values) for name, values in numbers.items()}


def _values(source: Folder, name: str, ternary: bool) -> np.ndarray:
    """`parameter_values` of a folder.

    ternary: whether they are to be quantized to ternary values. The scale will then be the mean of
    all magnitudes (SPEC 4.1), so ternary ones are made as much larger as zeros make that smaller.
    """
    numbers = parameter_values(source.config, source.tensors, name)
    if ternary and source.tensors[name].dtype == np.uint8:
        numbers *= numbers.size / max(int(np.count_nonzero(numbers)), 1)
    return numbers


def token_origins(tokenizer: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """For each id of a tokenizer the ids of `old` whose rows it begins with; none: all of them."""
    theirs = old.vocabulary()
    found: list[list[int]] = [[] for _ in range(tokenizer.size)]
    for token, i in tokenizer.vocabulary().items():
        if token in theirs:
            found[i] = [theirs[token]]
        else:
            text = tokenizer.decode([i])
            found[i] = [] if UNKNOWN in text else old.encode(text)
    return found


def carried(rows: np.ndarray, origins: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Rows f32 [count, D] for new tokens: the mean of those of their origins, or of all rows."""
    made = np.tile(rows.mean(0), (count, 1))
    for i, ids in enumerate(origins):
        if ids:
            made[i] = rows[list(ids)].mean(0)
    return made
