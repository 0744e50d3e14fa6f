"""Exit layers made visible: colours on a terminal, and the page."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import bitskip_cpu
from bitskip.program import runtime as main
from bitskip_cpu.cli.page import page
from bitskip_cpu.cli.showing import counts
from bitskip_cpu.colours import SCALE, depth_colour, ink, luminance, palette
from bitskip_cpu.generate import Piece, Telling
from bitskip_cpu.model import Model
from bitskip_ref.decoding.generate import Token
from bitskip_ref.folder import read_folder
from tests.cli.conftest import CONFIG, ScriptEngine

CODES = re.compile(r"\x1b\[[0-9;]*m")
TRUE_COLOURS = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
PLAIN = {"FORCE_COLOR": None, "NO_COLOR": None}
BY_TOKEN = ("--exit-layer", "max")  # a rule that decides for each token


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """Make `generate` load a model that says a text, at depths that go round 1, 2, 3, 4."""

    def make(text: str, interrupt_after: int = 1 << 30) -> None:
        class Engine(ScriptEngine):
            def step(self, *arguments: Any, **_: Any) -> Any:
                if len(self.fed) + 1 == interrupt_after:
                    raise KeyboardInterrupt
                return super().step(*arguments)

        def load(*_: Any, **__: Any) -> Model:
            made = Model(Engine(CONFIG, [], [1, 2, 3, 4] * 50), read_folder(folder))
            made.engine.script = [*made.tokenizer.encode(text), 0]
            return made

        monkeypatch.setattr("bitskip_cpu.cli.generate.load_model", load)

    return make


def generate(*arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)], **options)


class Reader(HTMLParser):
    """What a page holds: the text, its tokens' layers and titles, every attribute."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.layers, self.titles = "", [], []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self._inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        found = dict(attrs)
        self._inside = self._inside or found.get("id") == "text"
        if "data-d" in found:
            self.layers.append(int(found["data-d"]))
            self.titles.append(found["title"])

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.text += data


def test_one_scale_of_depth() -> None:
    assert depth_colour(1, 24) == SCALE[0] and depth_colour(24, 24) == SCALE[-1]
    assert depth_colour(2, 11) == (222, 198, 88)  # half-way between the first two
    assert depth_colour(1, 1) == SCALE[0]
    assert counts([3, 1, 3]) == [(1, 1), (3, 2)]
    shades = [luminance(depth_colour(n, 24)) for n in range(1, 25)]
    assert all(a > b for a, b in itertools.pairwise(shades))  # the deeper, the darker
    for shade, (_, on_it) in zip(shades, palette(24), strict=True):
        contrast = 1.05 / (shade + 0.05) if on_it == "#ffffff" else (shade + 0.05) / 0.05
        assert contrast > 4.5  # WCAG AA


def test_no_codes_without_a_terminal(script: Any) -> None:
    script("the cat sat")
    plain = generate("-p", "Once")
    shown = generate("-p", "Once", "--show-exits", *BY_TOKEN, env=PLAIN)
    assert shown.stdout == plain.stdout and "\x1b" not in shown.output
    assert "tokens by exit layer  1: " in shown.stderr
    both = {**TRUE_COLOURS, "NO_COLOR": "1"}
    assert "\x1b[38" not in generate("-p", "Once", "--show-exits", *BY_TOKEN, "-q", env=both).output


def test_colours(script: Any) -> None:
    script("the\tcat\r\n sat  on 😀")
    plain = generate("-p", "Once", "--quiet")
    shown = generate("-p", "Once", "--quiet", "--show-exits", *BY_TOKEN, env=TRUE_COLOURS)
    said = CODES.sub("", shown.stdout_bytes.decode())
    assert said == plain.stdout_bytes.decode()  # tabs, carriage returns and all
    for depth in (1, 2, 3, 4):
        back, front = depth_colour(depth, 4), ink(depth_colour(depth, 4))
        codes = ";".join(map(str, (38, 2, *front, 48, 2, *back)))
        assert f"\x1b[{codes}m" in shown.stdout
    colours = generate("-p", "Once", "--show-exits", *BY_TOKEN, env=TRUE_COLOURS)
    legend = colours.stderr.splitlines()[0]
    found = dict(re.findall(r" (\d) : (\d+) \(", CODES.sub("", legend)))
    ids = json.loads(generate("-p", "Once", "--json", "--show-exits", *BY_TOKEN).stdout)[
        "exit_layers"
    ]
    assert {int(k): int(v) for k, v in found.items()} == dict(counts(ids))


def test_the_page_holds_the_text_and_its_layers(script: Any, tmp_path: Path) -> None:
    script('a <b> & 日本 "c"\n\n the end')
    path = tmp_path / "page.html"
    facts = json.loads(generate("-p", "<i>Once", "--html", path, "--json", "--exit", 3).stdout)
    read = Reader(path.read_text("utf-8"))
    assert read.text == "<i>Once" + facts["text"]
    assert all(re.fullmatch(r"exit layer \d, \d+\.\d\d ms, token \d+", t) for t in read.titles)
    parts = [len(list(g)) for _, g in itertools.groupby(read.layers)]
    assert sum(parts) <= len(facts["exit_layers"])  # bytes of one character are shown together
    assert set(read.layers) == set(facts["exit_layers"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html"]


def test_the_page_loads_nothing(script: Any, tmp_path: Path) -> None:
    script("the cat")
    path = tmp_path / "page.html"
    prompt = "<script>alert(1)</script><img src=x onerror=y>"
    assert generate("-p", prompt, "--html", path).exit_code == 0
    source = path.read_text("utf-8")
    read = Reader(source)
    assert not {"script", "img", "link", "iframe", "object"} & set(read.tags)
    names = {name for name, _ in read.attributes}
    assert not names & {"src", "href", "xlink:href", "action"}
    assert not any(name.startswith("on") for name in names)
    assert "://" not in source and "url(" not in source and "@import" not in source
    assert "default-src 'none'" in source
    assert read.text.startswith(prompt)


def test_odd_pieces() -> None:
    pieces = [
        Piece("", 5, 2, 0.001), Piece("\x00\x1b[31m\ud800é", 6, 2, 0.002), Piece("held back"),
    ]  # fmt: skip
    source = page("", pieces, 4, {"exit": "<2>"})
    read = Reader(source)
    assert read.text == "\ufffd\ufffd[31m\ufffdéheld back" and read.layers == [2]
    assert "&lt;2&gt;" in source and source.count("<rect") == 4
    source.encode("utf-8")
    assert "No tokens." in page("prompt", [], 4, {})


def test_ctrl_c_still_writes_the_page(script: Any, tmp_path: Path) -> None:
    script("a b c d e f", interrupt_after=4)
    path = tmp_path / "page.html"
    result = generate("-p", "Once", "--html", path, "--show-exits")
    assert result.exit_code == 130
    assert Reader(path.read_text("utf-8")).text == result.stdout.removesuffix("\n")
    assert "interrupted" in path.read_text("utf-8")


def test_a_page_that_cannot_be(script: Any, tmp_path: Path) -> None:
    script("the cat")
    result = generate("-p", "Once", "--html", tmp_path / "nowhere" / "page.html")
    assert result.exit_code == 1 and "no such folder" in result.stderr and not result.stdout
    result = generate("-p", "Once", "--html", tmp_path)
    assert result.exit_code == 2 and "is a directory" in result.stderr


def test_tokens_that_came_at_once_share_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 7.0, 7.0, 7.0, 9.0])
    monkeypatch.setattr("bitskip_cpu.generate.time.perf_counter", lambda: next(clock))
    tokenizer = bitskip_cpu.load(folder, threads=1).tokenizer
    told = Telling(tokenizer, [1], stop=(), max_tokens=9, room=9)
    told.begin()
    times = [told.add(Token(5, 1, came)).seconds for came in (1, 3, 3, 3, 1)]
    assert times == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_seconds_are_the_model_s(folder: Path) -> None:
    stream = bitskip_cpu.load(folder).stream("Once", max_tokens=4)
    pieces = [p for p in stream if p.token_id is not None]
    assert all(p.seconds is not None and p.seconds > 0 for p in pieces)
    assert pieces[0].seconds == pytest.approx(stream.generation().ttft_s)
