"""The verb `generate` as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bitskip_cpu
import bitskip_ref
from bitskip.program import runtime as main
from bitskip_cpu.model import Model
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.folder import read_folder, write_auto_exit
from bitskip_ref.safetensors_file import write_tensors
from tests.cli.conftest import CONFIG, ScriptEngine, command, write_model

SCHEMA = {
    "model", "prompt", "text", "token_ids", "prompt_tokens", "generated_tokens", "exit_layers",
    "mean_exit_layer", "speculation", "stop_reason", "seed", "threads", "kv_cache", "ttft_s",
    "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes",
}  # fmt: skip


def generate(*arguments: Any, **options: Any) -> Any:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)], **options)


def facts(*arguments: Any, **options: Any) -> dict[str, Any]:
    result = generate(*arguments, "--json", **options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# ---- what it prints -----------------------------------------------------------------


def test_json_holds_all_that_scripts_read(folder: Path) -> None:
    got = facts(folder, "-p", "Once", "-n", 8, "--exit-layer", 3, "--seed", 5)
    assert got.keys() == SCHEMA
    assert got["generated_tokens"] == len(got["token_ids"]) == len(got["exit_layers"]) == 8
    assert set(got["exit_layers"]) == {3} and got["mean_exit_layer"] == 3
    assert got["kv_cache"] == "float32"
    assert got["stop_reason"] == "max_tokens"
    assert (got["seed"], got["prompt"]) == (5, "Once")
    assert got["peak_rss_bytes"] > 1 << 20
    assert got["ttft_s"] > 0 and got["prefill_tokens_per_s"] > 0
    model = bitskip_cpu.load(folder)
    assert got["text"] == model.tokenizer.decode(got["token_ids"])
    assert got["token_ids"] == model.generate("Once", max_tokens=8, exit_layer=3).token_ids


def test_text_goes_to_stdout_and_statistics_to_stderr(folder: Path) -> None:
    text = facts(folder, "-p", "Once", "-n", 5)["text"]
    result = generate(folder, "-p", "Once", "-n", 5)
    assert result.stdout == f"Once{text}\n"
    assert "5 tokens" in result.stderr and "exit layer 4 of 4" in result.stderr
    quiet = generate(folder, "-p", "Once", "-n", 5, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (f"{text}\n", "")


def test_the_prompt_comes_from_a_file_or_standard_input(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("Über 😀\n".encode())
    expected = facts(folder, "-p", "Über 😀", "-n", 4)
    assert expected["prompt"] == "Über 😀"
    for options, stdin in (
        (["--prompt-file", path], None),
        (["--prompt-file", "-"], "Über 😀\n"),
        (["--prompt", "-"], "Über 😀\r\n"),
    ):
        got = facts(folder, *options, "-n", 4, input=stdin)
        assert got["prompt"] == "Über 😀"
        assert got["token_ids"] == expected["token_ids"]


def test_same_seed_same_text(folder: Path) -> None:
    options = (folder, "-p", "Once", "-n", 12, "--temperature", 1.2, "--top-k", 50)
    first = facts(*options, "--seed", 1)
    assert first["text"] == facts(*options, "--seed", 1)["text"]
    assert first["text"] != facts(*options, "--seed", 2)["text"]


@pytest.mark.parametrize("exit_layer", ["gate", "max", "margin", "entropy"])
def test_exits_by_rule(folder: Path, exit_layer: str) -> None:
    options = (folder, "-p", "Once", "-n", 12, "--exit", exit_layer, "--exit-threshold", 0)
    # The first token is the prompt's, SPEC 8.7.
    assert facts(*options)["exit_layers"] == [4, *[1] * 11]
    assert facts(*options, "--exit-looks", "3,2")["exit_layers"] == [4, *[2] * 11]
    never = facts(*options[:-1], 1, "--exit-last", 3)
    assert never["exit_layers"] == [3] * 12
    got = facts(folder, "-p", "Once", "-n", 6, "--exit", exit_layer, "--exit-threshold", 1)
    assert got["exit_layers"] == [4] * 6


def test_auto_is_what_was_calibrated(folder: Path, tmp_path: Path) -> None:
    options = ("-p", "Once", "-n", 20)
    one_line(generate(folder, *options, "--exit", "auto"), "bitskip-cpu calibrate")
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    write_auto_exit(read_folder(copy), ConfidenceExit(0.02, layers=(2, 3)), {"budget": 0.04})
    auto = facts(copy, *options, "--exit", "auto")
    same = facts(folder, *options, "--exit", "max", "--exit-threshold", 0.02, "--exit-looks", "2,3")
    assert auto["exit_layers"] == same["exit_layers"] and 2 in same["exit_layers"]
    assert facts(copy, *options)["exit_layers"] == [4] * 20
    result = generate(copy, *options, "--exit", "auto", "--exit-threshold", 0.5)
    one_line(result, "brings its own threshold")


def test_stop_strings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    script(monkeypatch, folder, "the cat sat on the mat")
    got = facts("-p", "Once", "--stop", "on", "--stop", "sat o")
    assert (got["text"], got["stop_reason"]) == ("the cat ", "stop_string")
    assert generate("-p", "Once", "--stop", "sat", "-q").stdout == "the cat \n"


# ---- being interrupted --------------------------------------------------------------


def script(
    monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, interrupt_after: int = 1 << 30
) -> None:
    """`generate` loads a model that says a text, pressing Ctrl-C after some tokens."""

    class Engine(ScriptEngine):
        def step(self, *arguments: Any, **_: Any) -> Any:
            if len(self.fed) + 1 == interrupt_after:
                raise KeyboardInterrupt
            return super().step(*arguments)

    read = read_folder(folder)

    def load(*_: Any, **__: Any) -> Model:
        made = Model(Engine(CONFIG, []), read)
        made.engine.script = [*made.tokenizer.encode(text), 0]
        return made

    monkeypatch.setattr("bitskip_cpu.cli.generate.load_model", load)


def test_ctrl_c_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    script(monkeypatch, folder, "a b c d e f", interrupt_after=5)
    result = generate("-p", "Once")
    assert result.exit_code == 130
    assert result.stdout.startswith("Once" + "a b c d e f"[:3])
    assert "interrupted" in result.stderr
    result = generate("-p", "Once", "--json")
    assert result.exit_code == 130
    got = json.loads(result.stdout)
    assert got.keys() == SCHEMA
    assert got["stop_reason"] == "interrupted"
    assert got["generated_tokens"] == 5 and got["text"]


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not stop before it is told to."""
    config = CONFIG.replace(max_position_embeddings=100_000)
    path = tmp_path_factory.mktemp("long") / "model"
    return write_model(path, config, eos_token_id=None)


def start(*arguments: Any) -> subprocess.Popen[str]:
    """A process that listens to Ctrl-C, even if this one was started in the background."""
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "bitskip_cpu", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        preexec_fn=listen if os.name == "posix" else None,
    )  # fmt: skip


def test_a_real_ctrl_c(long_folder: Path) -> None:
    process = start("generate", long_folder, "-p", "Once", "-n", 100_000)
    assert process.stdout is not None
    said = process.stdout.read(6)  # two characters of the model's
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (said + rest).startswith("Once") and rest.endswith("\n")
    assert "interrupted" in errors and "Traceback" not in errors


def test_a_closed_pipe_ends_quietly(long_folder: Path) -> None:
    process = start("generate", long_folder, "-p", "Once", "-n", 100_000)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(6).startswith("Once")
    process.stdout.close()
    process.wait(60)
    errors = process.stderr.read()
    process.stderr.close()
    assert "Traceback" not in errors and "rror" not in errors


# ---- bad input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", ""], "prompt is empty"),
        (["-p", "a b c d e f g h" * 20], "context holds 64"),
        (["-p", "a", "--exit-layer", "0"], "0 is not in the range x>=1"),
        (["-p", "a", "--exit-layer", "5"], "choose 1..4"),
        (["-p", "a", "--exit-layer", "some"], "gate, max, margin, entropy, auto"),
        (["-p", "a", "--exit-threshold", "0.5"], "threshold"),
        (["-p", "a", "--exit-looks", "2"], "looks"),
        (["-p", "a", "--exit", "max", "--exit-looks", "4"], "choose 1..3"),
        (["-p", "a", "--exit", "max", "--exit-threshold", "nan"], "no finite number"),
        (["-p", "a", "--max-tokens", "-1"], "max-tokens"),
        (["-p", "a", "--ctx", "1000"], "choose 1..64"),
        (["-p", "a", "--top-p", "0"], "top-p"),
        (["-p", "a", "--threads", "0"], "threads"),
        (["-p", "a", "--prompt-file", "-"], "exclude each other"),
        (["--prompt-file", "no such file"], "no such file"),
        ([], "no prompt"),
        (["-p", "a", "--stop", ""], "empty stop string"),
        (["-p", "a", "--frobnicate"], "--frobnicate"),
    ],
)
def test_a_bad_option_is_one_line(folder: Path, options: list[str], message: str) -> None:
    one_line(generate(folder, *options), message)


def one_line(result: Any, message: str) -> None:
    assert result.exit_code in (1, 2), result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_prompt_that_is_not_utf8_is_one_line(folder: Path) -> None:
    one_line(generate(folder, "-p", "-", input=b"caf\xe9"), "not UTF-8 text (byte 3)")


def test_a_narrow_code_page_gets_question_marks(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    result = command("generate", folder, "-p", "日本", "-n", 0, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "??\n"


def test_an_argument_that_is_not_utf8_is_one_line(folder: Path) -> None:
    result = command("generate", folder, "-p", b"caf\xe9")
    assert result.returncode == 1
    assert result.stderr == "error: the text is not valid Unicode (it was not UTF-8)\n"


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


def illegal_code(folder: Path) -> None:
    read = read_folder(folder)
    tensors = {name: t.copy() for name, t in read.tensors.items()}
    tensors["layers.1.up_proj.weight"][3, 5] |= 0b11
    shapes = {k: (t.dtype.type, t.shape) for k, t in tensors.items()}
    digest = write_tensors(folder / "model.safetensors", shapes, tensors.values())
    edit(folder, weights_sha256=digest)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "cut off"),
    "flipped bit": (flip_a_bit, "checksum"),
    "illegal code": (illegal_code, "illegal 2-bit code 3"),
    "wrong shape": (lambda f: edit(f, intermediate_size=96), "the config asks for"),
    "unknown field": (lambda f: edit(f, colour="blue"), "unknown field"),
    "wrong type": (lambda f: edit(f, hidden_size="48"), "hidden_size"),
    "absurd size": (lambda f: edit(f, vocab_size=10**15), "vocab_size"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("[]"), "not a tokenizer"),
    "gone": (shutil.rmtree, "no model folder"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = HOSTILE[name]
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage(copy)
    one_line(generate(copy, "-p", "Once", "-n", 2), message)


def test_a_damaged_folder_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    flip_a_bit(copy)
    result = command("generate", copy, "-p", "Once")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_float16_cache_gives_the_reference_s_text(folder: Path) -> None:
    got = facts(folder, "-p", "Once", "-n", 12, "--kv-cache", "float16", "--threads", 2)
    assert got["kv_cache"] == "float16"
    reference = bitskip_ref.load(folder, "float16")
    prompt = bitskip_cpu.load(folder).tokenizer.encode("Once")
    expected = stream(reference, prompt, FixedExit(), Sampler(), 12, 0)
    assert got["token_ids"] == [token.id for token in expected]
    assert bitskip_cpu.load(folder, 1, "float16").new_cache().layer(0)[0].dtype == "float16"
    result = generate(folder, "-p", "Once", "--kv-cache", "int4")
    assert result.exit_code == 2 and "'float32', 'float16', 'int8'" in result.stderr
