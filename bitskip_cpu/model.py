"""A loaded model folder: an engine, its tokenizer and its way of generating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_cpu.generate import Generation, TextStream
from bitskip_ref.decoding.draft import Choose, Draft
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.engine import Engine, ExitRule, Trace, Visit
from bitskip_ref.exits.named import named_rule
from bitskip_ref.folder import Folder
from bitskip_text.tokenizer import Tokenizer, read_tokenizer


class Model:
    """A `bitskip_ref.engine.Engine`, by delegation, that also reads and writes text."""

    def __init__(self, engine: Engine, folder: Folder) -> None:
        """folder: what the engine was made from. Raises FormatError for a wrong tokenizer."""
        self.engine = engine
        self.config = engine.config
        self.folder = folder
        self._tokenizer = (
            read_tokenizer(folder.tokenizer, self.config.vocab_size) if folder.tokenizer else None
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer. Raises ValueError if it has none."""
        if self._tokenizer is None:
            raise ValueError(
                f"{self.folder.path} lacks tokenizer.json, which text needs: put the file there, "
                "or use token ids from Python (extend, step, logits)"
            )
        return self._tokenizer

    @property
    def threads(self) -> int:
        """Threads of the engine."""
        return getattr(self.engine, "threads", 1)

    @property
    def kv_cache(self) -> str:
        """What its caches hold, float32 or float16 (SPEC 6.5)."""
        return getattr(self.engine, "kv_cache", "float32")

    def exit_rule(
        self,
        exit_layer: int | str | None = None,
        threshold: float | None = None,
        looks: Sequence[int] | None = None,
        last: int | None = None,
    ) -> ExitRule:
        """The rule that `--exit-layer` and the options beside it mean for this model.

        As `bitskip_ref.exits.named.named_rule`; besides, `auto` is the setting that `calibrate`
        wrote into the folder, and None the folder's `exit_layer`, else all blocks. Raises
        ValueError.
        """
        beside = (threshold, looks, last)
        if exit_layer == "auto":
            if beside != (None, None, None):
                raise ValueError(
                    "exit layer auto brings its own threshold, looks and last block: leave them out"
                )
            if self.folder.auto_exit is None:
                raise ValueError(
                    f"{self.folder.path} holds no calibrated exit for auto: run `bitskip-cpu "
                    "calibrate MODEL --text FILE`, or choose a number of blocks, gate, max, ..."
                )
            return self.folder.auto_exit
        if exit_layer is None and beside == (None, None, None):
            exit_layer = self.folder.exit_layer
        return named_rule(exit_layer, *beside, self.config)

    def speculation(
        self,
        rule: ExitRule,
        speculate: int | str | None,
        draft_exit: int | None = None,
        draft_vocab: int | None = None,
    ) -> Speculation | None:
        """How one text is drafted and verified; None without `speculate`.

        speculate: drafts of a round, 1..16, or `auto`. draft_exit: where they come from; None: a
        quarter of the blocks that verify. draft_vocab: draft among that many first ids; None: as
        the folder recommends, else all. Raises ValueError, also for what does not combine with
        `rule`.
        """
        if speculate is None:
            if draft_exit is not None or draft_vocab is not None:
                raise ValueError("a draft exit or vocabulary needs speculate, a number or auto")
            return None
        if isinstance(speculate, str) and speculate != "auto":
            raise ValueError(f"speculate {speculate!r}: must be a number of drafts, or auto")
        count = None if isinstance(speculate, str) else speculate
        draft_vocab = self.folder.draft_vocab if draft_vocab is None else draft_vocab
        return Speculation(self.config, rule, draft_exit, count, draft_vocab)

    # ---- text -----------------------------------------------------------------------

    def generate(self, prompt: str, **options: Any) -> Generation:
        """The continuation of a prompt, with statistics; options as of `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.generation()

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 200,
        exit_layer: int | str | None = None,
        exit_threshold: float | None = None,
        exit_looks: Sequence[int] | None = None,
        exit_last: int | None = None,
        speculate: int | str | None = None,
        draft_exit: int | None = None,
        draft_vocab: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        context: int | None = None,
        threads: int | None = None,
        special: bool = False,
    ) -> TextStream:
        """The continuation of a prompt, piece by piece as it comes.

        special: special tokens spelled in the prompt (`<|endoftext|>`) are those tokens; otherwise
        they are text like any other.

        exit_layer, exit_threshold, exit_looks, exit_last: see `exit_rule`. speculate, draft_exit,
        draft_vocab: see `speculation`. temperature 0 is greedy, and the other sampling options
        (SPEC 9.2) then change nothing but the repetition penalty.
        context: positions that may be used; None: all the model has. threads: None keeps the
        engine's; another number makes a new engine on the same weights. Raises ValueError.
        """
        if threads not in (None, self.threads):
            from bitskip_cpu.engine import Engine as CpuEngine

            weights = getattr(self.engine, "weights", self.folder.tensors)
            self.engine = CpuEngine(self.config, weights, threads, self.folder, self.kv_cache)
        ids = self.tokenizer.encode(prompt, special)
        if not ids:
            raise ValueError("the prompt is empty: give at least one character")
        if self.folder.bos_token_id is not None:
            ids = [self.folder.bos_token_id, *ids]
        rule = self.exit_rule(exit_layer, exit_threshold, exit_looks, exit_last)
        return TextStream(
            self.engine,
            self.tokenizer,
            ids,
            rule=rule,
            speculation=self.speculation(rule, speculate, draft_exit, draft_vocab),
            sampler=Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed),
            max_tokens=max_tokens,
            stop=stop,
            context=context,
            eos_token_id=self.folder.eos_token_id,
        )

    # ---- the engine protocol --------------------------------------------------------

    def new_cache(self) -> Any:
        """See `bitskip_ref.engine.Engine.new_cache`."""
        return self.engine.new_cache()

    def extend(
        self,
        token_ids: Sequence[int],
        cache: Any,
        *,
        exit_layer: int | None = None,
        last_only: bool = False,
        trace: Trace | None = None,
    ) -> np.ndarray:
        """See `bitskip_ref.engine.Engine.extend`."""
        return self.engine.extend(
            token_ids, cache, exit_layer=exit_layer, last_only=last_only, trace=trace
        )

    def extend_exits(
        self, token_ids: Sequence[int], cache: Any, exit_layers: Sequence[int], visit: Visit
    ) -> None:
        """See `bitskip_ref.engine.Engine.extend_exits`."""
        self.engine.extend_exits(token_ids, cache, exit_layers, visit)

    def step(
        self, token_id: int, cache: Any, rule: ExitRule, trace: Trace | None = None
    ) -> tuple[np.ndarray, int]:
        """See `bitskip_ref.engine.Engine.step`."""
        return self.engine.step(token_id, cache, rule, trace)

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
        """See `bitskip_ref.engine.Engine.speculate`."""
        return self.engine.speculate(
            token_id, cache, count, draft, exit_layer=exit_layer, choose=choose
        )

    def logits(self, token_ids: Sequence[int], exit_layer: int | None = None) -> np.ndarray:
        """See `bitskip_ref.engine.Engine.logits`."""
        return self.engine.logits(token_ids, exit_layer)
