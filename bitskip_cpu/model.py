"""A loaded model folder: an engine, its tokenizer and its way of generating."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bitskip_cpu.generate import Generation, TextStream
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_ref.engine import Engine
from bitskip_ref.folder import Folder
from bitskip_ref.rule import ExitRule
from bitskip_text.tokenizer import Tokenizer, read_tokenizer


class Model:
    """Reads and writes text; its engine's verbs, for token ids, are its own as well.

    Those are `new_cache`, `logits`, `extend`, `extend_exits`, `step`, `step_many`, `speculate`,
    `speculate_many` and `round`: see `bitskip_ref.engine.Engine`.
    """

    def __init__(self, engine: Engine, folder: Folder) -> None:
        """folder: what the engine was made from. Raises FormatError for a wrong tokenizer."""
        self.engine = engine
        self.config = engine.config
        self.folder = folder
        self.new_cache, self.logits = engine.new_cache, engine.logits
        self.extend, self.extend_exits = engine.extend, engine.extend_exits
        self.step, self.step_many = engine.step, engine.step_many
        self.speculate, self.round = engine.speculate, engine.round
        self.speculate_many = engine.speculate_many
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
        return self.engine.threads

    @property
    def kv_cache(self) -> str:
        """What its caches hold, one of KV_CACHES (SPEC 6.5, 6.8)."""
        return self.engine.kv_cache

    def exit_rule(
        self,
        exit_layer: int | str | None = None,
        threshold: float | None = None,
        looks: Sequence[int] | None = None,
        last: int | None = None,
    ) -> ExitRule:
        """The rule that `--exit-layer` and the options beside it mean for this model.

        As in `GenerationOptions`. Raises ValueError.
        """
        looks = None if looks is None else tuple(looks)
        options = GenerationOptions(
            exit_layer=exit_layer, exit_threshold=threshold, exit_looks=looks, exit_last=last
        )
        return options.rule(self.folder)

    def generate(
        self,
        prompt: str,
        options: GenerationOptions | None = None,
        *,
        cache: Any = None,
        **changes: Any,
    ) -> Generation:
        """The continuation of a prompt, with statistics; arguments as of `stream`."""
        stream = self.stream(prompt, options, cache=cache, **changes)
        for _ in stream:
            pass
        return stream.generation()

    def stream(
        self,
        prompt: str,
        options: GenerationOptions | None = None,
        *,
        cache: Any = None,
        **changes: Any,
    ) -> TextStream:
        """The continuation of a prompt, piece by piece as it comes.

        options: None for the usual ones; changes: fields of `GenerationOptions` to change in them.
        cache: from `new_cache()`; the text goes on after what it holds, and it holds prompt and
        continuation, too, when the stream has ended. So the next prompt is only what comes then.
        Raises ValueError.
        """
        chosen = (options or GenerationOptions()).replace(**changes)
        ids = self.prompt_ids(prompt, chosen.special, first=cache is None or not cache.length)
        rule = chosen.rule(self.folder)
        return TextStream(
            self.engine,
            self.tokenizer,
            ids,
            rule=rule,
            speculation=chosen.speculation(rule, self.folder),
            sampler=chosen.recommended(self.folder).sampler,
            max_tokens=chosen.max_tokens,
            stop=chosen.stop,
            context=chosen.positions(self.config),
            eos_token_id=self.folder.end_ids,
            cache=cache,
        )

    def prompt_ids(self, prompt: str, special: bool = False, first: bool = True) -> list[int]:
        """The ids of a prompt; where a text begins with it, after the model's first token.

        special: as in `GenerationOptions`. Raises ValueError for what is no text, and for no token.
        """
        if not isinstance(prompt, str):
            raise ValueError(
                f"the prompt is a {type(prompt).__name__}, it must be a string; token ids are for "
                "extend and step"
            )
        ids = self.tokenizer.encode(prompt, special)
        if not ids:
            raise ValueError("the prompt is empty: give at least one character")
        if self.folder.bos_token_id is not None and first:
            ids = [self.folder.bos_token_id, *ids]
        return ids

    def generate_many(
        self,
        prompts: Iterable[str | tuple[str, GenerationOptions]],
        options: GenerationOptions | None = None,
        *,
        parallel: int = 8,
        **changes: Any,
    ) -> Iterator[Generation]:
        """The continuations of many prompts, in their order, `parallel` of them side by side.

        Each is what `generate` says to that prompt, to the bit; together they take less time. A
        prompt may bring options of its own. options, changes: as of `stream`, for the others.
        Raises ValueError at the prompt that is refused.
        """
        from bitskip_cpu.many.offline import in_order
        from bitskip_cpu.many.scheduler import Scheduler

        chosen = (options or GenerationOptions()).replace(**changes)
        pairs = ((p, chosen) if isinstance(p, str) else p for p in prompts)
        asked = ((self.prompt_ids(text, how.special), how) for text, how in pairs)
        for end in in_order(Scheduler(self, parallel=parallel), asked):
            if end.error is not None:
                raise ValueError(end.error)
            yield end.generation

    def hidden(self, text: str, exit_layer: int | None = None) -> np.ndarray:
        """What the exit's head sees of each token of a text: f32 [T, D] (SPEC 8.1), after its norm.

        exit_layer: blocks to run, 1..L (None: all). Raises ValueError as `extend`.
        """
        found: list[np.ndarray] = []

        def note(stage: str, values: np.ndarray) -> None:
            if stage == "exit_norm":
                found.append(values.copy())

        cache = self.new_cache()
        self.extend(self.prompt_ids(text), cache, exit_layer=exit_layer, trace=note)
        return found[0]
