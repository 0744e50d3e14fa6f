"""What a request's body asks for: every field checked, one line for the first that is wrong.

No field names a file, and nothing here opens one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from bitskip_cpu.chat import chat_ids
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.many.sequence import MOST_ALTERNATIVES
from bitskip_cpu.model import Model
from bitskip_ref.checks import is_number, is_whole
from bitskip_ref.constants import MEASURES
from bitskip_ref.excerpt import shown
from bitskip_ref.words import unknown
from bitskip_serve.refusal import Refusal

MOST_TEXTS = 128  # of one request: prompts times n
MOST_STOPS, MOST_BIASES = 64, 1024  # each costs time at every token, which other texts wait for
SHOWN = 5  # alternatives of a token in `details`
SEEDS = 1 << 64
LONGEST = 86400  # seconds of a request

# Fields that are options of a text under the same name.
OPTIONS = (
    "max_tokens", "exit_layer", "exit_threshold", "exit_looks", "exit_last", "speculate",
    "draft_exit", "draft_vocab", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "seed", "stop", "logit_bias",
)  # fmt: skip
OURS = ("model", "n", "stream", "stream_options", "logprobs", "details", "timeout")
# Taken and without effect: they say who asks, or where OpenAI runs a request.
UNUSED = ("user", "metadata", "service_tier", "safety_identifier", "store")
# Taken only with the value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "suffix": ("",), "best_of": (1,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
}  # fmt: skip
COMPLETION = frozenset((*OPTIONS, *OURS, *UNUSED, *NEUTRAL, "prompt", "echo"))
CHAT = frozenset(
    (*OPTIONS, *OURS, *UNUSED, *NEUTRAL, "messages", "top_logprobs", "max_completion_tokens")
)


@dataclass(frozen=True)
class Asked:
    """A request for texts, checked except for what the model's `Sequence` checks."""

    chat: bool
    model: str  # as it was named
    prompts: list[list[int]]
    options: list[GenerationOptions]  # of each of a prompt's n texts
    stream: bool = False
    usage: bool = False  # a last chunk with it
    echo: bool = False
    alternatives: int | None = None  # log probabilities asked for, with so many alternatives
    details: bool = False
    timeout: float | None = None  # seconds

    @property
    def texts(self) -> int:
        """How many texts: n of each prompt."""
        return len(self.prompts) * len(self.options)

    @property
    def looked_at(self) -> int | None:
        """Alternatives of each token that a text must tell of; None: it tells of none."""
        if not self.details or self.options[0].drafts:
            return self.alternatives
        return max(SHOWN, self.alternatives or 0)


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises Refusal."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise Refusal("the body is not UTF-8, or has half a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(f"the body is {shown(value)}: it must be a JSON object")
    return value


def read(body: dict[str, Any], model: Model, name: str, chat: bool) -> Asked:
    """A parsed body of /v1/chat/completions (chat), or /v1/completions. Raises Refusal."""
    given = {field: value for field, value in body.items() if value is not None}
    known = CHAT if chat else COMPLETION
    for field, value in given.items():
        if field not in known:
            raise Refusal(unknown("field", field[:100], sorted(known)), field[:100])
        if field in NEUTRAL and value not in NEUTRAL[field]:
            raise Refusal(f"{field} = {shown(value)}: this server does not have it", field)
    named, exit_layer = read_model(given.get("model", name), model, name)
    changes = {field: given[field] for field in OPTIONS if field in given}
    if exit_layer is not None:
        changes.setdefault("exit_layer", exit_layer)
    if "max_completion_tokens" in given:
        changes["max_tokens"] = given["max_completion_tokens"]
    if isinstance(stop := changes.get("stop"), str):
        changes["stop"] = (stop,)
    elif isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise Refusal(f"{len(stop)} stop strings: at most {MOST_STOPS}", "stop")
    if "logit_bias" in changes:
        changes["logit_bias"] = _bias(changes["logit_bias"], model.config.vocab_size)
    options = _options(changes)
    part = "exit_layer"
    try:
        rule, part = options.rule(model.folder), "speculate"
        options.speculation(rule, model.folder)
    except ValueError as error:
        raise Refusal(str(error), part) from None
    stream = _flag(given, "stream")
    n = _whole(given, "n", 1, 1, MOST_TEXTS)
    prompts = _messages(given, model) if chat else _prompts(given, model)
    if len(prompts) * n > MOST_TEXTS:
        raise Refusal(f"{len(prompts)} prompts of {n} texts: at most {MOST_TEXTS} in all", "n")
    asked = Asked(
        chat, named, prompts,
        [replace(options, seed=(int(options.seed) + i) % SEEDS) for i in range(n)],
        stream=stream, usage=_usage(given, stream), echo=_flag(given, "echo"),
        alternatives=_alternatives(given, chat), details=_flag(given, "details"),
        timeout=_timeout(given),
    )  # fmt: skip
    if asked.echo and stream and asked.alternatives is not None:
        raise Refusal("an echo with logprobs is not streamed: leave one of the three out", "echo")
    if asked.alternatives is not None and options.drafts:
        raise Refusal("a text that is speculated has no logprobs: leave one out", "logprobs")
    return asked


def read_model(named: Any, model: Model, name: str) -> tuple[str, int | str | None]:
    """What a model's name means: `name`, or `name@` and an exit. Raises Refusal: there is no other.

    Returns the name and the exit, None for the usual one.
    """
    if not isinstance(named, str):
        raise Refusal(f"model = {shown(named)}: must be a string", "model")
    base, at, exit_layer = named.partition("@")
    if base == name and not at:
        return named, None
    blocks = model.config.num_hidden_layers
    if base == name and exit_layer in map(str, range(1, blocks + 1)):
        return named, int(exit_layer)
    if base == name and exit_layer in words(model):
        return named, exit_layer
    raise Refusal(
        f"no model {shown(named)} here: there is {name}, and {name}@N with an exit 1..{blocks}",
        "model", 404,
    )  # fmt: skip


def words(model: Model) -> list[str]:
    """The exits of a model that are words."""
    found = [*MEASURES]
    if model.config.gates:
        found.append("gate")
    if model.folder.auto_exit is not None:
        found.append("auto")
    return found


def token_ids(value: Any, model: Model, field: str) -> list[int]:
    """A list of ids of the vocabulary. Raises Refusal."""
    size = model.config.vocab_size
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < size for i in value):
        raise Refusal(f"{field} = {shown(value)}: must be a list of ids of 0..{size - 1}", field)
    return value


def text(value: Any, field: str) -> str:
    """A string. Raises Refusal."""
    if not isinstance(value, str):
        raise Refusal(f"{field} = {shown(value)}: must be a string", field)
    return value


# ---- fields -----------------------------------------------------------------------------


def _options(changes: Mapping[str, Any]) -> GenerationOptions:
    try:
        return GenerationOptions(**changes)
    except (ValueError, TypeError, OverflowError) as error:
        first: dict[str, Any] = {}  # some need others, which stand before them
        for field in filter(changes.__contains__, OPTIONS):  # whose fault it is
            first[field] = changes[field]
            try:
                GenerationOptions(**first)
            except (ValueError, TypeError, OverflowError) as alone:
                raise Refusal(f"{field}: {alone}", field) from None
        raise Refusal(str(error)) from None


def _flag(given: Mapping[str, Any], field: str) -> bool:
    value = given.get(field, False)
    if not isinstance(value, bool):
        raise Refusal(f"{field} = {shown(value)}: must be true or false", field)
    return value


def _whole(given: Mapping[str, Any], field: str, usual: int, least: int, most: int) -> int:
    value = given.get(field, usual)
    if not is_whole(value) or not least <= value <= most:
        raise Refusal(f"{field} = {shown(value)}: must be a whole number of {least}..{most}", field)
    return int(value)


def _alternatives(given: Mapping[str, Any], chat: bool) -> int | None:
    """How many are asked for; None: no log probabilities."""
    if not chat:
        if given.get("logprobs") in (None, False):
            return None
        return _whole(given, "logprobs", 0, 0, MOST_ALTERNATIVES)
    if _flag(given, "logprobs"):
        return _whole(given, "top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if "top_logprobs" in given:
        raise Refusal("top_logprobs needs logprobs: true", "top_logprobs")
    return None


def _usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refusal(f"stream_options = {shown(options)}: must be an object", "stream_options")
    if options and not stream:
        raise Refusal("stream_options needs stream: true", "stream_options")
    return _flag({k: v for k, v in options.items() if v is not None}, "include_usage")


def _timeout(given: Mapping[str, Any]) -> float | None:
    value = given.get("timeout")
    if value is None:
        return None
    if not is_number(value) or not 0 < value <= LONGEST:
        raise Refusal(f"timeout = {shown(value)}: must be seconds, up to {LONGEST}", "timeout")
    return float(value)


def _bias(value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise Refusal(f"logit_bias = {shown(value)}: must be an object", "logit_bias")
    if len(value) > MOST_BIASES:
        raise Refusal(f"logit_bias has {len(value)} ids: at most {MOST_BIASES}", "logit_bias")
    for token in value:
        if not (token.isascii() and token.isdigit() and len(token) < 9 and int(token) < vocab_size):
            raise Refusal(
                f"logit_bias: {shown(token)} is no id of 0..{vocab_size - 1}", "logit_bias"
            )
    return tuple((int(token), bias) for token, bias in value.items())


# ---- prompts ----------------------------------------------------------------------------


def _prompts(given: Mapping[str, Any], model: Model) -> list[list[int]]:
    """A text, a list of ids, or a list of either."""
    value = given.get("prompt")
    if value is None:
        raise Refusal("prompt is missing", "prompt")
    one = isinstance(value, str) or (
        isinstance(value, list) and bool(value) and not isinstance(value[0], str | list)
    )
    several = [value] if one else value
    if not isinstance(several, list) or not several:
        raise Refusal(
            f"prompt = {shown(value)}: must be a string, a list of ids, or a list of those",
            "prompt",
        )
    if len(several) > MOST_TEXTS:
        raise Refusal(f"{len(several)} prompts: at most {MOST_TEXTS}", "prompt")
    return [
        _ids(lambda p=p: model.prompt_ids(p), "prompt")  # type: ignore[misc]
        if isinstance(p, str) else token_ids(p, model, "prompt")
        for p in several
    ]  # fmt: skip


def _messages(given: Mapping[str, Any], model: Model) -> list[list[int]]:
    """By the model's template; without one the texts of the messages, a line each."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages: must be a list of at least one message", "messages")
    checked = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    form = model.folder.chat
    if form is None:
        plain = "\n".join(m["content"] for m in checked)
        return [_ids(lambda: model.prompt_ids(plain), "messages")]
    return [_ids(lambda: chat_ids(model.tokenizer, form, checked), "messages")]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Refusal(f"{where} = {shown(value)}: must be an object", "messages")
    role, content = value.get("role"), value.get("content")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise Refusal(f"{where}.role = {shown(role)}: system, user or assistant", "messages")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise Refusal(f"{where}.content: only parts of type text are known", "messages")
        content = "".join(map(str, parts))
    return {"role": role, "content": text(content, "messages")}


def _ids(encode: Callable[[], list[int]], field: str) -> list[int]:
    try:
        return encode()
    except ValueError as error:
        raise Refusal(str(error), field) from None
