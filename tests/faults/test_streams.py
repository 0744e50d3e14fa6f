"""Every verb with standard streams that are closed, full, or read by nobody (fault C5)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from bitskip.early import interrupted
from bitskip.signals import ends_on_signals
from tests.cli.test_every_verb import ROOT, VERBS, fine, place

__all__ = ["place"]  # a fixture
# Each verb in a child of one process, whose streams are as they were given to it.
PROBE = """
import json, os, sys
from bitskip.program import main
report = open(sys.argv[1], "w", closefd=True)
for words in json.loads(sys.argv[2]):
    main.get_command(None, words[0])
for words in json.loads(sys.argv[2]):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=report, flush=True)
    else:
        main(words)  # SystemExit, as if it were the program
        os._exit(99)
"""
LIGHT = {"generate", "chat", "inspect", "perplexity", "import"}
LASTING = {"serve", "eval"}  # the one runs until it is told to stop, the other asks for the network
every = pytest.mark.parametrize(
    "some",
    [LIGHT, pytest.param(set(VERBS) - LASTING, marks=pytest.mark.slow)],
    ids=["light", "every"],
)


def codes(
    some: set[str], place: Path, redirected: str, tmp_path: Path
) -> tuple[dict[str, int], str]:
    """Verb -> exit code, and what came on standard error."""
    verbs = [verb for verb in VERBS if verb in some]
    words = [
        [w.replace(str(place / "out"), str(tmp_path / verb)) for w in fine(verb, place)]
        for verb in verbs
    ]
    report, errors = tmp_path / "codes", tmp_path / "errors"
    script = f'"$@" {redirected.format(errors=errors)}'
    probe = [sys.executable, "-W", "ignore", "-c", PROBE, str(report), json.dumps(words)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    subprocess.run(
        ["bash", "-c", script, "bash", *probe], cwd=ROOT, check=True, timeout=600, env=buffered
    )
    found = map(int, report.read_text().split())
    said = errors.read_text() if errors.exists() else ""
    return dict(zip(verbs, found, strict=True)), said


@every
@pytest.mark.parametrize("closed", ["<&- >&- 2>{errors}", "2>&-"])
def test_c5_closed_streams_change_nothing(
    closed: str, some: set[str], place: Path, tmp_path: Path
) -> None:
    found, said = codes(some, place, closed, tmp_path)
    assert set(found.values()) == {0}, (found, said)
    assert "Traceback" not in said and "Exception ignored" not in said


def test_c5_a_server_without_streams_serves(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "bitskip", "serve", str(place / "model"), "--port", port]
    script = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *words]
    server = subprocess.Popen(script, cwd=ROOT)
    try:
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as r:
                assert r.status == 200
                break
            assert server.poll() is None, server.returncode
            time.sleep(0.1)
        else:
            pytest.fail("it does not answer")
        server.terminate()
        assert server.wait(60) in (0, 128 + signal.SIGTERM)
    finally:
        server.kill()


@pytest.mark.parametrize("words", ["--help", "--version", "generate --help", "inspect stories-24"])
def test_c5_a_full_disk_is_one_line_and_one_exit_code(words: str) -> None:
    """Whoever buffers: Python's own end tries no more."""
    for environment in ({}, {"PYTHONUNBUFFERED": "1"}):
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "bitskip", *words.split()], cwd=ROOT, stdout=full,
                stderr=subprocess.PIPE, text=True, env=kept | environment,
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (
            1, "error: [Errno 28] No space left on device\n",
        )  # fmt: skip


@every
def test_c5_a_full_disk_behind_standard_output(some: set[str], place: Path, tmp_path: Path) -> None:
    found, said = codes(some, place, ">/dev/full 2>{errors}", tmp_path)
    silent = {"average", "fit-gates", "train", "chat"}
    assert all(found[verb] == (0 if verb in silent else 1) for verb in found), (found, said)
    assert "Traceback" not in said and "Exception ignored" not in said
    assert said.count("error: [Errno 28] No space left on device") == sum(found.values())


@every
def test_c5_nobody_reads(some: set[str], place: Path, tmp_path: Path) -> None:
    found, said = codes(some, place, "2>{errors} | true", tmp_path)
    assert set(found.values()) <= {0, 1}
    assert "Traceback" not in said and "Exception ignored" not in said and "error" not in said


def test_c5_a_prompt_from_a_closed_stream(place: Path) -> None:
    words = f'"{sys.executable}" -m bitskip generate "{place / "model"}" -p - <&-'
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the prompt is empty: give at least one character\n"


@pytest.mark.parametrize(
    "name", ["bitskip", "bitskip_cpu", "bitskip_train", "bitskip_export", "bitskip_experiments"]
)
def test_d4_every_package_with_verbs_is_a_program(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", name, "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("bitskip"), done.stderr


def test_ctrl_c_while_the_program_is_imported() -> None:
    """One line, no traceback, whatever is half imported then."""
    code = """
import os, signal, sys
from bitskip import entry

class Slow:
    def find_spec(self, name, *rest):
        if name == "bitskip.program":
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("Ctrl-C was not heard")

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Slow())
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_in_a_verb_is_an_exception() -> None:
    """Which the verb may answer: a training saves."""
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), ends_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        assert signal.getsignal(signal.SIGINT) is interrupted
    finally:
        signal.signal(signal.SIGINT, before)


SLOW_FINALIZER = """
import os, signal, sys, time
from bitskip.errors import one_line_errors
from bitskip.signals import ends_on_signals

class Closed:
    def __init__(self):
        if sys.argv[1] == "made":
            os.kill(os.getpid(), int(sys.argv[2]))
            time.sleep(10)
        self.open = True

    def __del__(self):
        if sys.argv[1] == "closed":
            os.kill(os.getpid(), int(sys.argv[2]))
            for _ in range(100):
                time.sleep(0.01)
        del self.open

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with one_line_errors(), ends_on_signals():
        Closed()
        time.sleep(10)
        print("it was not told")
except BaseException as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["made", "closed"])
def test_a_signal_within_a_finalizer_or_before_one(when: str, number: signal.Signals) -> None:
    """It is not lost in a finalizer; one of what was made in part prints no traceback."""
    words = [sys.executable, "-c", SLOW_FINALIZER, when, str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True)
    line = "interrupted\n" if number == signal.SIGINT else "ended\n"
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", line)


def test_errors_of_finalizers_are_told_where_no_signal_was() -> None:
    code = SLOW_FINALIZER.replace("        Closed()", "        Closed(), Closed().__del__()")
    code = code.replace("time.sleep(10)", "raise ValueError('the end')")
    done = subprocess.run([sys.executable, "-c", code, "-", "0"], capture_output=True, text=True)
    assert "Exception ignored in" in done.stderr and "AttributeError" in done.stderr
