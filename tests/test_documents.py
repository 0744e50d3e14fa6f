"""Documents that must stay true: the settings' tables, links, commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from bitskip.program import main
from bitskip_train.described import settings
from bitskip_train.settings import TrainConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "bitskip_cpu/models/*", "results", "results/*")
    for path in ROOT.glob(f"{folder}/*.md")
)
STARTS = (["bitskip"], ["bitskip-cpu"], ["python", "cli.py"], ["python", "-m", "bitskip"])
FENCE = re.compile(r"^ *```")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def generator() -> Any:
    """docs/make_settings.py as a module."""
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/make_settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_tables_are_up_to_date() -> None:
    written = (ROOT / "docs/SETTINGS.md").read_text("utf-8")
    assert written == generator().document(), "run: python docs/make_settings.py"


def test_a_changed_setting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = generator()
    monkeypatch.setitem(found.train_config.RANGES, "context", (3, 1 << 20))
    assert "| 3 to 1,048,576 |" in found.document()


def test_a_setting_without_words_is_seen() -> None:
    assert {s.name for s in settings(TrainConfig)} == set(vars(TrainConfig()))
    with pytest.raises(AssertionError, match=r"Bare\.x: no meaning"):
        settings(Bare)


class Bare:
    """Settings of which one lacks its meaning."""

    x: int = 1
    y: int = 2
    """Some meaning."""


# ---- links ------------------------------------------------------------------------


def prose(text: str) -> Iterator[str]:
    """The lines outside fenced blocks."""
    inside = False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            yield line


def anchors(text: str) -> set[str]:
    """The names of a document's headings, as GitHub makes them."""
    heads = (line.lstrip("#").strip() for line in prose(text) if re.match(r"#+ ", line))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(path: Path, text: str) -> list[str]:
    """Links of a document that lead to no file, or to no heading."""
    wrong = []
    for target in LINK.findall(re.sub(r"`[^`]*`", "", "\n".join(prose(text)))):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:|mailto:", file):
            continue
        place = path.parent / file if file else path
        if not place.exists() or (anchor and anchor not in anchors(place.read_text("utf-8"))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "link", ["[a](GUIDE.md)", "[a](#nowhere)", "[a](docs/GUIDE.md#6-nothing)", "[a](docs/X.md#1)"]
)
def test_a_planted_link_is_seen(link: str) -> None:
    good = "[b](docs/GUIDE.md#5-glossary) [c](#two-commands)"
    assert broken_links(ROOT / "README.md", f"{good} `[d](nothing)` {link}") == [link[4:-1]]


def test_documents_are_reachable_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    named = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(readme)}
    assert {p.resolve() for p in ROOT.glob("docs/*.md")} - named == set()


# ---- commands ---------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The commands of ours in fenced blocks and in `code`, without the program's name."""
    inside, lines = False, []
    for line in text.replace("\\\n", " ").splitlines():
        if FENCE.match(line):
            inside = not inside
        elif inside:
            lines.append(line.removeprefix("$ "))
    spoken = re.findall(r"`([^`]+)`", " ".join(prose(text)))
    for line in lines + spoken:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # no shell: an apostrophe in a program's output
            continue
        for part in split_at(words, ("&&", "|", ">", ";", "...")):
            for start in STARTS:
                if part[: len(start)] == start and len(part) > len(start):
                    yield part[len(start) :]


def split_at(words: list[str], signs: tuple[str, ...]) -> Iterator[list[str]]:
    """The parts of a line between some words."""
    part: list[str] = []
    for word in [*words, signs[0]]:
        if word in signs:
            yield part
            part = []
        else:
            part.append(word)


def mistake(words: list[str]) -> str | None:
    """Why a command would not run: its verb, an option or a value; None where all is well."""
    verb, *arguments = words
    if not re.fullmatch(r"[a-z][a-z-]+", verb):  # `bitskip -h`, `bitskip VERB`
        return None
    context = click.Context(main, info_name="bitskip")
    command = main.get_command(context, verb)
    if command is None:
        return f"no verb {verb}"
    context = click.Context(command, info_name=verb)
    try:
        values, rest, _ = command.make_parser(context).parse_args([*arguments])
        for parameter in command.params:
            value = values.get(parameter.name)
            on_disk = isinstance(parameter.type, click.Path | click.File)
            if value is not None and not on_disk and plain(value):
                parameter.type_cast_value(context, value)
    except click.UsageError as error:
        return error.format_message()
    if rest:
        return f"too many words: {rest}"
    lacking = [p.name for p in command.params if p.required and not values.get(p.name)]
    return f"lacks {lacking[0]}" if lacking and arguments else None


def plain(value: Any) -> bool:
    """Whether a value is meant as it stands: not N, FILE, RUN/last.pt or the like."""
    parts = value if isinstance(value, list | tuple) else [value]
    return not any(re.search(r"[A-Z]{2,}|\b[A-Z]\b", str(part)) for part in parts)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_can_be_read(path: Path) -> None:
    found = list(commands(path.read_text("utf-8")))
    problems = {" ".join(words): problem for words in found if (problem := mistake(words))}
    assert problems == {}
    if path.name in ("README.md", "GUIDE.md") and path.parent in (ROOT, ROOT / "docs"):
        assert len(found) >= 8


@pytest.mark.parametrize(
    "text",
    [
        "```\nbitskip generat\n```",
        "```\npip install . && bitskip generate --exit-layr 18\n```",
        "```\n$ bitskip bench -p soon\n```",
        "say `python cli.py train --presets tiny --out x`",
        "```\nbitskip perplexity mine --text t.txt \\\n    --exits 3\n```",
        "```\nbitskip-cpu generate one two\n```",
        "```\nbitskip fit-gates mean.pt -o gated.pt\n```",
    ],
)
def test_a_planted_mistake_in_a_command_is_seen(text: str) -> None:
    (words,) = commands(text)
    assert mistake(words)


def silent(command: click.Command) -> list[str]:
    """The options of a verb whose help says nothing."""
    options = (p for p in command.params if isinstance(p, click.Option))
    return [option.opts[0] for option in options if not option.help]


@pytest.mark.parametrize("verb", main.list_commands(click.Context(main)))
def test_every_option_says_what_it_is(verb: str) -> None:
    command = main.get_command(click.Context(main), verb)
    assert command is not None and command.help
    assert silent(command) == []


def test_a_silent_option_is_seen() -> None:
    options = [click.Option(["--said"], help="Is."), click.Option(["-s", "--not-said"])]
    assert silent(click.Command("planted", params=[*options])) == ["-s"]


# ---- files and names --------------------------------------------------------------

CODE = re.compile(r"`([\w./]+\.py)(?::([\w.]+))?`")
SOURCES = [p for p in ROOT.rglob("*.py") if not {"build", ".venv"} & set(p.parts)]


def missing_code(text: str) -> list[str]:
    """The files `folder/file.py`, and names in them `file.py:Class.name`, that are not there."""
    wrong = []
    for file, name in CODE.findall(text):
        found = [p for p in SOURCES if p.as_posix().endswith(f"/{file}")]
        pattern = rf"(def|class) {name.split('.')[-1]}\b|^ *{name.split('.')[-1]}\b.*="
        if not any(not name or re.search(pattern, p.read_text("utf-8"), re.M) for p in found):
            wrong.append(f"{file}:{name}")
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    assert missing_code(path.read_text("utf-8")) == []


@pytest.mark.parametrize("text", ["`kernels/jobs.py`", "`bitskip_ref/engine.py:Nothing.at_all`"])
def test_a_planted_name_is_seen(text: str) -> None:
    assert missing_code(f"`bitskip_ref/engine.py:Engine.step` {text}") != []
