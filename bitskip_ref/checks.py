"""What may be asked of an engine: exits, token ids, positions; one clear line for each refusal.

An engine calls these in its own turn (`bitskip_ref.turn`): what they found stays true until it is
used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from bitskip_ref.config import ModelConfig
from bitskip_ref.excerpt import shown


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, Python's or NumPy's; True and False are none."""
    return type(value) is int or isinstance(value, np.integer)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_exit_layer(exit_layer: int | None, config: ModelConfig) -> int:
    """Blocks to run, L for None. Raises ValueError for what is no integer in 1..L."""
    if exit_layer is None:
        return config.num_hidden_layers
    if type(exit_layer) is int and 1 <= exit_layer <= config.num_hidden_layers:
        return exit_layer  # asked for at every token
    if not is_whole(exit_layer):
        raise ValueError(
            f"exit layer {exit_layer!r} must be a whole number of blocks, "
            f"1..{config.num_hidden_layers}"
        )
    if not 1 <= exit_layer <= config.num_hidden_layers:
        raise ValueError(
            f"exit layer {exit_layer} is out of range: the model has "
            f"{config.num_hidden_layers} blocks, choose 1..{config.num_hidden_layers}"
        )
    return int(exit_layer)


def check_exit_layers(exit_layers: Iterable[int], config: ModelConfig) -> list[int]:
    """The exits in order of depth, without repeats. Raises ValueError for none, or outside 1..L."""
    if not isinstance(exit_layers, Iterable):
        raise ValueError(f"exit layers {shown(exit_layers)}: must be numbers of blocks, in a list")
    exits = sorted({check_exit_layer(n, config) for n in exit_layers})
    if not exits:
        raise ValueError("no exit layers: give at least one")
    return exits


def check_looks(looks: Iterable[int], deepest: int) -> tuple[int, ...]:
    """Depths at which a rule is asked. Raises ValueError unless they rise within 1..deepest - 1."""
    try:
        last, checked = 0, tuple(looks)
    except TypeError:
        raise ValueError(f"exit looks {looks!r}: must be a tuple of numbers of blocks") from None
    for n in checked:
        if not is_whole(n) or not last < n < deepest:
            rule = f"choose from 1..{deepest - 1}" if deepest > 1 else "there is nothing to skip"
            raise ValueError(
                f"exit looks {checked}: must be whole numbers of blocks that rise and stay below "
                f"{deepest}, the rule's last block; {rule}"
            )
        last = n
    return tuple(map(int, checked))


def check_logits(largest: np.ndarray, first: int) -> None:
    """Refuse logits that choose no token (SPEC 9.5).

    largest: f32 [T], the largest logit of tokens `first`, `first` + 1, ... (NaN counts as the
    largest). Raises ValueError where one is not a finite number.
    """
    finite = np.isfinite(largest)
    if not finite.all():
        raise ValueError(
            f"the logits of token {first + int(np.argmin(finite))} are not finite numbers: the "
            "model's weights are too large; train or convert it anew"
        )


def check_input(
    token_ids: Sequence[int] | np.ndarray, first: int, config: ModelConfig, room: int
) -> np.ndarray:
    """Token ids as int64 [T], copied, to be run from position `first` on, `room` being the end.

    Raises ValueError for none, ids outside 0..V-1, or no room.
    """
    try:
        ids = np.array(token_ids)
    except ValueError:  # lists of several lengths
        raise ValueError("token ids must be in a list, not in lists of a list") from None
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError("no tokens: give at least one token id, in a list")
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token ids must be integers in 0..{config.vocab_size - 1}")
    check_room(first, ids.size, room)
    return ids.astype(np.int64)


def check_token(token_id: int, first: int, config: ModelConfig, room: int) -> int:
    """`check_input` of one token, at a tenth of its time where all is well."""
    if type(token_id) is int and 0 <= token_id < config.vocab_size and first < room:
        return token_id
    return int(check_input([token_id], first, config, room)[0])


def check_room(first: int, positions: int, room: int) -> None:
    """Raise ValueError unless a cache for `room` positions takes as many from `first` on."""
    if first + positions > room:
        raise ValueError(
            f"{first} + {positions} positions exceed the context of {room}: shorten the prompt or "
            "start anew"
        )
