"""What every engine offers, so that any can be checked against any other.

The NumPy reference, PyTorch, Numba and ONNX Runtime each have one class of this shape. Stages are
reported to a trace in forward order, under the same names, so that a difference can be located.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bitskip_ref.config import ModelConfig

if TYPE_CHECKING:  # drafts need exits, which ask a Probe
    from bitskip_ref.decoding.draft import Choose, Draft

Trace = Callable[[str, np.ndarray], None]
"""Receives (stage, values). Stages, i counting blocks from 0:

embed [T, D]; layers.{i}.q [T, H, E] and .k [T, K, E] (after RoPE), .v [T, K, E],
.attn [T, H * E] (SPEC 6.3, before any sub-norm), .mid [T, D] (after the attention sublayer),
.act [T, F] (FFN activation, before any sub-norm), .out [T, D]; exit_norm [T, D]; logits [T, V].
Arrays may be reused by the engine after the call: copy what is kept.
"""

Visit = Callable[[int, int, np.ndarray], None]
"""Receives (exit layer, first, logits f32 [t, V]) of the tokens at hand from the one numbered
`first` on. Arrays may be reused by the engine after the call; it may not be called meanwhile."""


class Probe(Protocol):
    """What an exit rule may ask about the token at hand after a block (SPEC 8.4, 8.5)."""

    def gate(self) -> np.float32:
        """Exit probability of the block's routing gate."""

    def confidence(self, measure: str) -> np.float32:
        """`max`, `margin` or `entropy` of the logits at this exit."""


class ExitRule(Protocol):
    """A way of choosing how many blocks a token runs."""

    def deepest(self, config: ModelConfig) -> int:
        """Blocks that the prompt runs, and every token that is not stopped before: 1..L."""

    def looks(self, config: ModelConfig) -> tuple[int, ...]:
        """Depths after which `stops` is asked, rising, below `deepest`; none: a fixed exit."""

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError, with the remedy, where the rule means nothing for this model."""

    def stops(self, probe: Probe) -> bool:
        """Whether to stop here; asked at each of `looks` until it says so."""


class Engine(Protocol):
    """A loaded model. Batch size is 1; token ids are integers in 0..V-1."""

    config: ModelConfig

    def new_cache(self) -> Any:
        """An empty KV cache, a CacheFill, for `config.max_position_embeddings` positions.

        Its numbers are float32 or float16 as the engine was made (`kv_cache`, SPEC 6.5).
        """

    def extend(
        self,
        token_ids: Sequence[int],
        cache: Any,
        *,
        exit_layer: int | None = None,
        last_only: bool = False,
        trace: Trace | None = None,
    ) -> np.ndarray:
        """Run the tokens after what the cache holds; advance the cache.

        `exit_layer` 1..L counts executed blocks (None: L). Returns logits f32 [T, V], or [1, V]
        of the last token with `last_only`. Raises ValueError for an empty list, an id or exit out
        of range, more positions than the context, or blocks that lack earlier positions.
        """

    def extend_exits(
        self, token_ids: Sequence[int], cache: Any, exit_layers: Sequence[int], visit: Visit
    ) -> None:
        """`extend` to the deepest of some exits, with the logits at each of them on the way.

        Each exit's logits come in pieces, in the order of the tokens. Raises ValueError as
        `extend`, and for no exits.
        """

    def step(
        self, token_id: int, cache: Any, rule: ExitRule, trace: Trace | None = None
    ) -> tuple[np.ndarray, int]:
        """Run one token under a rule (SPEC 8.2, 8.3, 8.6). Returns (logits f32 [V], depth)."""

    def speculate(
        self,
        token_id: int,
        cache: Any,
        count: int,
        draft: Draft,
        *,
        exit_layer: int | None = None,
        choose: Choose | None = None,
    ) -> tuple[list[int], np.ndarray]:
        """Run a round of at most `count` drafts after one token; advance the cache by k + 1.

        Returns the k drafts that were run and verified at `exit_layer` (None: L), and the logits
        f32 [k + 1, V] after the token and after each of them (SPEC 11.1). Drafts are greedy, or
        what `choose` makes of the draft logits of each position, the last one's too; it must not
        use this engine. Raises ValueError as `extend` does, and for what cannot draft.
        """

    def logits(self, token_ids: Sequence[int], exit_layer: int | None = None) -> np.ndarray:
        """`extend` on an empty cache: f32 [T, V]."""
