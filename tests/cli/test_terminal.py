"""What reaches a terminal, and what the shell completes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from bitskip.terminal import visible
from bitskip_ref.words import unknown

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b]0;title\x07b\rc\x9b31md\u202ee\tf\n"


def on_a_terminal(words: list[str], **environment: str) -> str:
    """What a program writes to a terminal as its standard output."""
    main, side = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "bitskip", *words], stdout=side, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL, cwd=ROOT, env=os.environ | {"TERM": "xterm"} | environment,
    )  # fmt: skip
    os.close(side)
    said = b""
    while True:
        try:
            part = os.read(main, 1 << 16)
        except OSError:  # the other side is closed
            part = b""
        if not part:
            break
        said += part
    os.close(main)
    assert done.wait(60) == 0
    return said.decode()


def test_control_characters_are_spelled_out() -> None:
    shown = visible(HOSTILE)
    assert shown == "a\\x1b]0;title\\x07b\\rc\\x9b31md\\u202ee\tf\n"
    assert visible("naïve 日本 😀\n") == "naïve 日本 😀\n"


def test_text_on_a_terminal_is_harmless(folder: Path) -> None:
    """C4: a prompt and a text with escape sequences; a pipe gets them as they are."""
    words = ["generate", str(folder), "-p", "x\x1b[2Jy", "-n", "0"]
    assert "x\\x1b[2Jy" in on_a_terminal(words, NO_COLOR="1")
    piped = subprocess.run(
        [sys.executable, "-m", "bitskip", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert piped.stdout == "x\x1b[2Jy\n"


@pytest.mark.parametrize(
    ("environment", "colours"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_where_they_are_wanted(
    folder: Path, environment: dict[str, str], colours: bool
) -> None:
    for more in ([], ["--show-exits"]):
        said = on_a_terminal(["generate", str(folder), "-p", "x", "-n", "4", *more], **environment)
        assert ("\x1b" in said) == colours


def complete(*words: str) -> list[str]:
    """What the shell is offered for the last word."""
    environment = {
        "_BITSKIP_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["bitskip", *words]),
        "COMP_CWORD": str(len(words)),
    }  # fmt: skip
    code = "from bitskip.program import main; main(prog_name='bitskip')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes_verbs_models_presets_and_exits() -> None:
    assert complete("ge") == ["generate"]
    assert {"train", "export", "reproduce"} <= set(complete(""))
    assert "stories-24" in complete("generate", "sto")
    assert complete("bench", "--preset", "bitskip-v") == ["bitskip-v1", "bitskip-v2", "bitskip-v3"]
    assert "wt2-bitskip" in complete("train", "--preset", "wt2")
    assert complete("generate", "--exit", "ma") == ["max", "margin"]
    assert complete("perplexity", "--exit-layer", "6,ga") == ["6,gate"]
    assert complete("train", "--set", "train.lr") == ["train.lr="]
    assert "v2-table2" in complete("reproduce", "v2")
    assert complete("verify", "--engines", "ref,o") == ["ref,onnx"]
    assert "--exit-threshold" in complete("generate", "--exit-t")


def test_the_likeliest_word() -> None:
    assert unknown("preset", "TINY", ["tiny", "huge"]) == (
        "unknown preset 'TINY' (did you mean tiny?); known: tiny, huge"
    )
    assert unknown("rule", "zzz", []) == "unknown rule 'zzz'; known: none"
    many = [f"setting_{i}" for i in range(50)]
    assert unknown("setting", "seting_7", many) == (
        "unknown setting 'seting_7' (did you mean setting_7?)"
    )
    assert unknown("setting", "qqq", many).count(",") == 49
