"""A bitskip model as lm-eval's tasks want one: likelihoods of continuations, and generated texts.

lm-eval looks models up by name; importing this module registers `bitskip`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bitskip.options import MODEL_TYPE
from bitskip.terminal import progress_bar
from bitskip_cpu import load
from bitskip_cpu.chat import render
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.heldout.continuations import log_likelihoods
from bitskip_cpu.heldout.text import end_of_text
from bitskip_cpu.many.offline import in_order
from bitskip_cpu.many.scheduler import Scheduler
from bitskip_cpu.model import Model
from bitskip_ref.folder import SAMPLING
from bitskip_ref.words import unknown

TAKEN = (*SAMPLING, "seed")  # of what a task says of generating
"""Of a task's `generation_kwargs`, those that are options of ours under the same name."""
ARGUMENTS = ("path", "exit_layer", "exit_threshold", "threads", "kv_cache", "max_length")


@register_model("bitskip")
class BitskipLM(TemplateLM):
    """A loaded model under one exit rule. Tokens a text ends with come from its folder."""

    def __init__(
        self,
        path: str | Model,
        exit_layer: int | str | None = None,
        exit_threshold: float | None = None,
        threads: int | None = None,
        kv_cache: str = "float32",
        max_length: int | None = None,
        batch_size: int | str | None = None,
        **unused: Any,
    ) -> None:
        """path: a model folder, a shipped model's name, another program's model, or one loaded.

        exit_layer, exit_threshold: as of `GenerationOptions`. max_length: positions that may be
        used (None: all). batch_size: texts that are generated side by side (None, or no number: 8).
        unused: `device` and `max_batch_size`, which lm-eval gives to every model. Raises ValueError
        for what is wrong in these, and for other names.
        """
        super().__init__()
        for name in unused.keys() - {"device", "max_batch_size"}:
            raise ValueError(unknown("argument", name, ARGUMENTS))
        if not isinstance(path, Model):
            path = load(MODEL_TYPE.convert(path, None, None), threads, kv_cache)
        self.model = path
        # What a task does not say of sampling changes nothing, whatever the folder recommends.
        self.options = GenerationOptions(
            exit_layer=exit_layer, exit_threshold=exit_threshold, context=max_length,
            temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        )  # fmt: skip
        self.rule = self.options.rule(path.folder)
        self.max_length = self.options.positions(path.config)
        self.parallel = int(str(batch_size)) if str(batch_size).isdecimal() else 8
        self._end = end_of_text(path)
        self._templated = False

    # ---- tokens ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The id before a text that nothing precedes: the model's first, else its end-of-text."""
        first = self.model.folder.bos_token_id
        return self._end if first is None else first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; unless told not to, after the model's first token if it has one.

        Special tokens spelled in a text are tokens only where a chat template wrote them.
        """
        ids = self.model.tokenizer.encode(string, special=self._templated)
        first = self.model.folder.bos_token_id
        if first is None or add_special_tokens is False or ids[:1] == [first]:
            return ids
        return [first, *ids]

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps templated requests under."""
        return str(self.model.folder.path.resolve())

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template. Raises ValueError if it has none."""
        return self._form.template if chat_template else None

    @property
    def _form(self) -> Any:
        form = self.model.folder.chat
        if form is None:
            raise ValueError(f"{self.model.folder.path} has no chat_template.jinja")
        return form

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as a prompt, by the model's template."""
        self._templated = True
        return render(self._form, chat_history, answer=add_generation_prompt)

    # ---- what tasks ask for --------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As lm-eval's models do: of what does not fit, the first tokens are left out."""
        pairs = []
        for _, context, said in requests:
            whole = [*context, *said][-(self.max_length + 1) :]
            said = whole[1:][-len(said) :]
            pairs.append((whole[: -len(said)], said))
        return self._scored(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        """Of whole texts, in windows of `max_length` that do not overlap, each after a token."""
        windows: list[tuple[list[int], list[int]]] = []
        ends = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += map(make_disjoint_window, rolled)
            ends.append(len(windows))
        found = [likelihood for likelihood, _ in self._scored(windows)]
        return [math.fsum(found[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        with progress_bar("scoring", sum(len(said) for _, said in pairs)) as advance:
            return log_likelihoods(self.model.engine, pairs, self.rule, advance=advance)

    def generate_until(self, requests: list[Instance], **kwargs: Any) -> list[str]:
        """Texts up to the strings of `until`, side by side; each is what `generate` says alone."""
        asked = [self._asked(*request.args) for request in requests]
        texts: list[str] = []
        with progress_bar("generating", len(asked)) as advance:
            for end in in_order(Scheduler(self.model, parallel=self.parallel), asked):
                if end.error is not None:
                    raise ValueError(end.error)
                texts.append(end.generation.text)
                advance(1)
        return texts

    def _asked(self, context: str, how: Mapping[str, Any]) -> tuple[list[int], GenerationOptions]:
        """Ids of a prompt, its first tokens left out if it does not fit, and its options."""
        given: dict[str, Any] = {**normalize_gen_kwargs(dict(how), self.options.max_tokens)}
        until, most = given.pop("until"), min(given.pop("max_gen_toks"), self.max_length - 1)
        if given.pop("do_sample"):
            given.setdefault("temperature", 1.0)
        for name in given:
            if name not in TAKEN:
                raise ValueError(unknown("generation option", name, TAKEN))
        ids = self.tok_encode(context) or [self.prefix_token_id]
        stop = [text for text in until if text]
        options = self.options.replace(max_tokens=most, stop=stop, **given)
        return ids[-(self.max_length - most) :], options
