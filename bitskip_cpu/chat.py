"""Conversations: messages by a model's own template, each token run once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from bitskip_cpu.generate import TextStream
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.model import Model
from bitskip_ref.excerpt import one_line
from bitskip_ref.folder import ChatForm, Folder
from bitskip_text.tokenizer import Tokenizer

MOST_LINES = 1_000_000  # of a template, run for one prompt; a long conversation takes thousands
LONGEST = 1 << 26  # characters of a prompt
Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


def render(form: ChatForm, messages: Sequence[Message], answer: bool = True) -> str:
    """The prompt that asks for the next answer, as transformers' `apply_chat_template` makes it.

    answer: whether it ends with what begins an answer. The template comes with the model, so it
    runs in Jinja's sandbox. Raises ValueError for what the template refuses (some take no system
    message), for one that is not Jinja, and for one that does not come to an end.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
    said: list[str] = []
    try:
        pieces = environment.from_string(form.template).generate(
            messages=[dict(m) for m in messages], add_generation_prompt=answer,
            bos_token=form.bos_token, eos_token=form.eos_token, tools=None, documents=None,
        )  # fmt: skip
        with _bounded(lambda: refuse(f"takes more than {MOST_LINES} steps")):
            size = 0
            for piece in pieces:
                said.append(piece)
                size += len(piece)
                if size > LONGEST:
                    refuse(f"writes more than {LONGEST} characters")
    except Exception as error:  # filters of Jinja raise any
        raise ValueError(f"the model's chat template: {one_line(error)}") from None
    return "".join(said)


@contextmanager
def _bounded(refuse: Callable[[], None]) -> Iterator[None]:
    """Have templates call `refuse` when they have run MOST_LINES lines: the sandbox bounds one
    loop, not loops within loops."""
    left = MOST_LINES

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            refuse()
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def chat_ids(tokenizer: Tokenizer, form: ChatForm, messages: Sequence[Message]) -> list[int]:
    """Token ids of `render`: special tokens of the template are tokens, of the messages text.

    Who writes a message can so neither end it nor speak as somebody else. Raises ValueError.
    """
    said = "".join(message["content"] for message in messages)
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in said + form.template)
    spellings = sorted(tokenizer.special_tokens, key=len, reverse=True)
    if not any(spelling in said for spelling in spellings):
        return tokenizer.encode(render(form, messages), special=True)
    either = "|".join(map(re.escape, spellings))
    found: list[str] = []

    def hide(match: re.Match[str]) -> str:
        found.append(match[0])
        return f"{mark}{len(found) - 1}{mark}"

    hidden = [{**m, "content": re.sub(either, hide, m["content"])} for m in messages]
    ids: list[int] = []
    for at, part in enumerate(render(form, hidden).split(mark)):  # odd ones are numbers in `found`
        text = found[int(part)] if at % 2 else part
        ids += tokenizer.encode(text, special=not at % 2)
    return ids


def form_of(folder: Folder) -> ChatForm:
    """How a folder's model chats. Raises ValueError for one without a chat template."""
    if folder.chat is None:
        raise ValueError(
            f"{folder.path} has no chat_template.jinja: it continues texts, see bitskip generate"
        )
    import jinja2  # noqa: F401  # if it is missing, better said before the first message

    return folder.chat


class Chat:
    """A conversation with a model. What a new prompt shares with the last one is not run again."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        """system: the first message. Raises ValueError for a model without a chat template."""
        self.model, self._form = model, form_of(model.folder)
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._cache = model.new_cache()
        self._held: list[int] = []  # ids of the cache's positions
        self._depth = 0  # blocks that ran all of them
        self.reused = 0
        """Tokens of the last prompt that were in the cache already."""

    def ask(self, content: str, options: GenerationOptions) -> TextStream:
        """The answer to a message, piece by piece; end it with `keep`.

        Raises ValueError, and leaves the conversation as it was, if the prompt does not fit.
        """
        model, folder = self.model, self.model.folder
        messages = [*self.messages, {"role": "user", "content": content}]
        ids = chat_ids(model.tokenizer, self._form, messages)
        rule, options = options.rule(folder), options.recommended(folder)
        depth = rule.deepest(model.config)
        same = 0
        if depth <= self._depth:  # what deeper blocks hold beside does not matter (SPEC 8.2)
            held = self._held[: self._cache.length]  # less of an answer that was never asked on
            for mine, new in zip(held, ids[:-1], strict=False):
                if mine != new:
                    break
                same += 1
        cache = self._cache if same else model.new_cache()
        cache.length = same
        self._cache, self._held, self._depth = cache, ids[:same], depth
        stream = TextStream(
            model.engine, model.tokenizer, ids[same:],
            rule=rule, speculation=options.speculation(rule, folder), sampler=options.sampler,
            max_tokens=options.max_tokens, stop=options.stop,
            context=options.positions(model.config), eos_token_id=folder.end_ids, cache=cache,
        )  # fmt: skip
        self._held, self.messages, self.reused = ids, messages, same
        return stream

    def keep(self, stream: TextStream) -> str:
        """Take what an `ask` has said so far, finished or broken off, as the answer; returns it."""
        told = stream.generation()
        self._held = [*self._held, *told.token_ids][: self._cache.length]
        self.messages.append({"role": "assistant", "content": told.text})
        return told.text
