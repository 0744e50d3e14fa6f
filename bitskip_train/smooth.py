"""What a head reads, made even before it is rounded to 8 bits (SmoothQuant, arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bitskip_ref.config import HEAD_BITS, ConfigError, ModelConfig
from bitskip_train.model import BitskipModel

TOKENS = 1 << 14  # of the text, at most
SHARE = 0.75  # of the activations, beside the head's columns, in a channel's factor; measured


def _check(config: ModelConfig) -> None:
    """Raises ConfigError for a model whose heads cannot be smoothed, or have no need to be."""
    if config.head_format not in HEAD_BITS:
        raise ConfigError(
            f"head_format = {config.head_format!r}: nothing is rounded before such a head; "
            f"smooth one of {', '.join(HEAD_BITS)}"
        )
    if config.tie_word_embeddings:
        raise ConfigError("tie_word_embeddings = true: the head is the embedding, which must stay")
    if config.rotated_head:
        raise ConfigError("rotated_head = true: what the head reads is even already (SPEC 5.4)")


@torch.no_grad()
def smooth(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokens: np.ndarray,
    context: int,
    exits: Sequence[int],
) -> dict[str, Tensor]:
    """The parameters with norms before heads divided, and columns of heads multiplied, by a factor
    for each channel: the logits are the same but for rounding, and rounding takes less from them.

    A few channels that are larger than all others make the step of the others' 8-bit codes too wide
    (SPEC 4.2). A channel's factor is rms ** SHARE / largest ** (1 - SHARE), of what these exits'
    heads read at the text's tokens int64 [N], in windows of `context`, and of the head's column.
    exits: n = 1..L. Raises ConfigError for heads that cannot be smoothed or need not be, ValueError
    for no tokens.
    """
    _check(config)
    if not len(tokens):
        raise ValueError("no tokens: a head is smoothed by what it reads, so give some text")
    model = BitskipModel(config)
    model.load_state_dict(state)
    squares: dict[str, Tensor] = {}
    for first in range(0, min(len(tokens), TOKENS), context):
        ids = torch.from_numpy(tokens[first : first + context].astype(np.int64))
        for n, hidden in model(ids[None], collect=exits).items():
            if n in config.exit_blocks:
                hidden = model.exit_block(n, hidden, model.ops())
            read = model.exit_norm(n)(hidden[0], model.ops()).double().square().sum(0)
            head = config.exit_names(n)[1]
            squares[head] = squares.get(head, torch.zeros_like(read)) + read
    factors: dict[str, Tensor] = {}
    for head, total in squares.items():
        largest = state[f"{head}.weight"].abs().amax(0).double()
        found = total.sqrt() ** SHARE / largest ** (1 - SHARE)
        even = torch.where(found.isfinite() & (found > 0), found, found.new_ones(()))
        factors[head] = even / even.log().mean().exp()
    changed = dict(state)
    for n in range(1, config.num_hidden_layers + 1):
        norm, head = config.exit_names(n)
        for name in (f"{norm}.weight", f"{norm}.bias", f"{head}.weight"):
            if head in factors and name in state:
                factor = factors[head] if name.startswith(head) else 1 / factors[head]
                changed[name] = (state[name].double() * factor).float()
    return changed
