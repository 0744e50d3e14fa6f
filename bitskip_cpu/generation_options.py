"""How a text is generated: every option of it, checked when made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bitskip_ref.checks import is_number, is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.generate import check_max_tokens
from bitskip_ref.decoding.lookup import Lookup
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.exits.named import named_rule
from bitskip_ref.folder import SAMPLING, Folder
from bitskip_ref.rule import ExitRule
from bitskip_text.streaming import StopStrings

SPECULATE = ("auto", "lookup")
"""What `speculate` may be beside a number."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one text. What depends on the model is checked when a text begins.

    A wrong type or a value out of range raises ValueError with the option and the rule. A list is
    taken where a tuple is stored; NumPy's numbers are numbers, too.
    """

    max_tokens: int = 200
    """Tokens to write, at most."""
    exit_layer: int | str | None = None
    """Blocks that every token runs, or what decides token by token: `gate`, `max`, `margin`,
    `entropy`. `auto`: the setting that `calibrate` wrote into the folder. None: the folder's
    recommendation, else all blocks."""
    exit_threshold: float | None = None
    """A token stops above it, 0 to 1. None: 0.5 for `gate`, 0.9 for the others."""
    exit_looks: tuple[int, ...] | None = None
    """Blocks after which it may stop. None: all for `gate`, the quarters for the others."""
    exit_last: int | None = None
    """Where it stops at the latest. None: the last block."""
    speculate: int | str | None = None
    """Drafts of a round, 1..16, or `auto`, which adapts it (SPEC 11.4); `lookup`: drafts are looked
    up in the text so far (SPEC 11.5). None: no speculation."""
    draft_exit: int | None = None
    """Blocks that draft. None: a quarter of those that verify."""
    draft_vocab: int | None = None
    """Draft among that many first ids. None: as the folder recommends, else all."""
    temperature: float | None = None
    """0 is greedy: top_k, top_p and min_p then change nothing (SPEC 9.2). None, here and in the
    next four: what the folder recommends (SPEC 9.7), else what changes nothing."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0: all."""
    top_p: float | None = None
    """Keep the likeliest tokens whose probabilities add up to this, above 0 and at most 1."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest, 0 to 1."""
    repetition_penalty: float | None = None
    """Above 1: tokens that stand in prompt or text become less likely. 1: off."""
    seed: int = 0
    """Of the random draws: the same seed, the same text (SPEC 9.2)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit, -100 to 100 (SPEC 9.2)."""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends."""
    context: int | None = None
    """Positions that may be used. None: all that the model has."""
    special: bool = False
    """Special tokens spelled in the prompt (`<|endoftext|>`) are those tokens, not text."""

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
        for name in ("exit_layer", "speculate"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or is_whole(value)):
                raise ValueError(f"{name} = {value!r}: must be a whole number, a word or None")
        for name in ("exit_last", "draft_exit", "draft_vocab", "context"):
            value = getattr(self, name)
            if not (value is None or is_whole(value)):
                raise ValueError(f"{name} = {value!r}: must be a whole number or None")
        if not (self.exit_threshold is None or is_number(self.exit_threshold)):
            raise ValueError(f"exit_threshold = {self.exit_threshold!r}: must be a number or None")
        if not isinstance(self.special, bool):
            raise ValueError(f"special = {self.special!r}: must be True or False")
        if self.exit_looks is not None:
            self._keep("exit_looks", is_whole, "whole numbers, like [6, 12]")
        self._keep("logit_bias", lambda p: isinstance(p, Iterable), "pairs, like [[50, -1.5]]")
        object.__setattr__(self, "logit_bias", tuple(tuple(pair) for pair in self.logit_bias))
        self._keep("stop", lambda s: isinstance(s, str), 'strings, like ["\\n"]')
        StopStrings(self.stop)  # which refuses an empty one
        if isinstance(self.speculate, str) and self.speculate not in SPECULATE:
            raise ValueError(
                f"speculate {self.speculate!r}: must be a number of drafts, auto or lookup"
            )
        if not self.drafts and (self.draft_exit, self.draft_vocab) != (None, None):
            raise ValueError("a draft exit or vocabulary needs speculate, a number or auto")
        _ = self.sampler  # which checks its part

    def _keep(self, name: str, good: Any, what: str) -> None:
        """Store a sequence as a tuple, once all of its items are good."""
        value = getattr(self, name)
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise ValueError(f"{name} = {value!r}: must be a list of {what}")
        items = tuple(value)
        if not all(map(good, items)):
            raise ValueError(f"{name} = {value!r}: must be a list of {what}")
        object.__setattr__(self, name, items)

    def replace(self, **changes: Any) -> GenerationOptions:
        """A checked copy with some options changed. Raises TypeError for one that there is not."""
        return dataclasses.replace(self, **changes)

    @property
    def drafts(self) -> bool:
        """Whether the model drafts (SPEC 11.1). Texts with drafts tell no log probabilities."""
        return self.speculate not in (None, "lookup")

    @property
    def sampler(self) -> Sampler:
        """How tokens are chosen, without a folder's recommendations.

        A Sampler has a value for each of its numbers; these options may leave one to a folder.
        """
        said = {n: v for n in SAMPLING if (v := getattr(self, n)) is not None}
        return Sampler(**said, seed=self.seed, logit_bias=self.logit_bias)

    def recommended(self, folder: Folder) -> GenerationOptions:
        """A copy that says of sampling what these options leave to a folder (SPEC 9.7)."""
        usual = {n: folder.sampling.get(n, getattr(Sampler, n)) for n in SAMPLING}
        return self.replace(**{n: v for n, v in usual.items() if getattr(self, n) is None})

    def rule(self, folder: Folder) -> ExitRule:
        """How many blocks a token runs, checked for a folder's model. Raises ValueError."""
        beside = (self.exit_threshold, self.exit_looks, self.exit_last)
        if self.exit_layer == "auto":
            if beside != (None, None, None):
                raise ValueError(
                    "exit layer auto brings its own threshold, looks and last block: leave them out"
                )
            if folder.auto_exit is None:
                raise ValueError(
                    f"{folder.path} holds no calibrated exit for auto: run `bitskip-cpu "
                    "calibrate MODEL --text FILE`, or choose a number of blocks, gate, max, ..."
                )
            return folder.auto_exit
        exit_layer = self.exit_layer
        if exit_layer is None and beside == (None, None, None):
            exit_layer = folder.exit_layer
        return named_rule(exit_layer, *beside, folder.config)

    def speculation(self, rule: ExitRule, folder: Folder) -> Speculation | Lookup | None:
        """How one text is drafted and verified; None without `speculate`.

        Raises ValueError for what does not combine with `rule`, or with a folder's model.
        """
        if self.speculate is None:
            return None
        if self.speculate == "lookup":
            return Lookup(folder.config, rule)
        count = None if isinstance(self.speculate, str) else self.speculate
        vocab = folder.draft_vocab if self.draft_vocab is None else self.draft_vocab
        return Speculation(folder.config, rule, self.draft_exit, count, vocab)

    def positions(self, config: ModelConfig) -> int:
        """Positions that may be used: `context`, or all. Raises ValueError beyond the model's."""
        limit = config.max_position_embeddings
        if self.context is not None and not 1 <= self.context <= limit:
            raise ValueError(f"context {self.context}: this model's is {limit}, choose 1..{limit}")
        return limit if self.context is None else int(self.context)
