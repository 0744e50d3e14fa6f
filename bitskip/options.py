"""Option types and options that several verbs share: one word means one thing everywhere.

Only click is imported here; what a type knows (presets, models, exits) is asked for when a value
is read or completed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from bitskip.places import user_cache
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.words import unknown

Known = Callable[[], Iterable[str]]
Decorator = Callable[[Any], Any]


class Word(click.ParamType):
    """One of some words, which are asked for when a value is read."""

    otherwise = ""  # what else is taken, for messages

    def __init__(self, kind: str, known: Known) -> None:
        """kind: what the word names, for messages and as metavar."""
        self.name, self.known = kind, known

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The word as it is known."""
        words = list(self.known())
        if value not in words:
            self.fail(unknown(self.name, str(value), words) + self.otherwise, param, ctx)
        return value

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """The words that begin so."""
        return [CompletionItem(w) for w in self.known() if w.startswith(incomplete)]


class NumberOr(Word):
    """A whole number, or one of some words."""

    otherwise = ", or a whole number"

    def __init__(self, kind: str, known: Known, least: int = 1, most: int | None = None) -> None:
        super().__init__(kind, known)
        self.number = click.IntRange(least, most)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """A number as int, a word as it is."""
        if str(value).lstrip("+-").isdecimal():
            return self.number.convert(value, param, ctx)
        return super().convert(value, param, ctx)


class Listed(click.ParamType):
    """Values separated by commas, in the order given, without repeats. The one list parser."""

    name = "list"

    def __init__(self, item: click.ParamType, *, empty: bool = False, count: int = 0) -> None:
        """empty: whether no value is allowed. count: how many there must be, repeats kept."""
        self.item, self.empty, self.count = item, empty, count

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The values as the item's type gives them."""
        if not isinstance(value, str):
            return value  # converted before
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        found = [self.item.convert(part, param, ctx) for part in parts]
        if self.count and len(found) != self.count:
            self.fail(f"{value!r}: must be {self.count} values, separated by commas", param, ctx)
        if not found and not self.empty:
            self.fail(f"{value!r}: must be one value or more, separated by commas", param, ctx)
        return tuple(found) if self.count else list(dict.fromkeys(found))

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Completions of the last value."""
        before, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        return [CompletionItem(before + comma + item.value) for item in found]


class _Model(click.ParamType):
    """A model folder, the name of a model that comes with the package, or another program's model.

    The last is converted once into the user's cache, and the value is the folder there.
    """

    name = "model"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The path of a folder, or the name as it is."""
        place = Path(value)
        if not _foreign(place):
            return str(value)
        from bitskip_export.foreign.opened import cached

        return str(cached(place))

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Folders, and the shipped names that begin so."""
        from bitskip_cpu import models

        names = [CompletionItem(n) for n in models.names() if n.startswith(incomplete)]
        return [CompletionItem(incomplete, type="dir"), *names]


def _foreign(place: Path) -> bool:
    """Whether that is a model of another program: a GGUF file or a Hugging Face folder."""
    if place.suffix == ".gguf":
        return place.is_file()
    from bitskip_ref.folder import CONFIG, read_json

    try:
        kind = read_json(place / CONFIG).get("model_type")
    except (OSError, ValueError):
        return False
    return isinstance(kind, str) and kind != "bitskip"


class Finite(click.FloatRange):
    """A number of a range, and one it is: click lets nan through, and inf where there is no top."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The number as float."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


def _presets() -> Iterable[str]:
    from bitskip_ref.config import PRESETS

    return PRESETS


def _rules() -> Iterable[str]:
    from bitskip_ref.exits.named import DYNAMIC

    return DYNAMIC


WHOLE = click.IntRange(0)
COUNT = click.IntRange(1)
SHARE = Finite(0, 1)
PRESET = Word("preset", _presets)
RULE = Word("rule", _rules)
EXIT = NumberOr("exit", lambda: [*_rules(), "auto"])
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)  # to read
NEW_FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)

MODEL_TYPE = _Model()
MODEL = click.argument("model", required=False, type=MODEL_TYPE)
THREADS = click.option(
    "--threads", "-t", type=COUNT,
    help="Threads to compute with. Default: what suits model and machine, at most the physical "
    "cores.",
)  # fmt: skip
KV_CACHE = click.option(
    "--kv-cache", type=click.Choice(KV_CACHES), default="float32", show_default=True,
    help="Keys and values: float16 takes half the memory, int8 a quarter; both round them.",
)  # fmt: skip


def kv_cache_or(usual: str) -> Decorator:
    """The option `--kv-cache` of a verb that takes what the folder recommends, else `usual`."""
    return click.option(
        "--kv-cache", type=click.Choice(KV_CACHES),
        help="Keys and values: float16 takes half the memory of float32, int8 a quarter; both "
        f"round them. Default: the folder's recommendation, else {usual}.",
    )  # fmt: skip


TOKEN_CACHE = click.option(
    "--token-cache", type=FOLDER, default=lambda: user_cache() / "tokens",
    show_default="the user's cache folder", help="Folder for tokenized text.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def exit_layer(name: str, type: click.ParamType, help: str, metavar: str) -> Decorator:
    """The option `--exit-layer` or `--exit`, whose value the verb takes as `name`."""
    return click.option("--exit-layer", "--exit", name, type=type, help=help, metavar=metavar)
