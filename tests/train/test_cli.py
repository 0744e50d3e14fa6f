"""`train` and `evaluate` as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bitskip.program import main
from bitskip_train.checkpoint import load_checkpoint

SMALL = [
    "tokenizer=bpe:300", "context=16", "batch=2", "eval_tokens=200", "save_every=1000", "threads=1",
]  # fmt: skip


def run(*arguments: str | Path) -> Result:
    """The verb in this process; an exception that is no clean exit fails the test."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train_arguments(text: Path, out: Path, *sets: str) -> list[str]:
    found = ["train", "--preset", "tiny", "--data", text, "--valid", text, "--out", out]
    found += ["--token-cache", out.parent / "cache", "--no-tensorboard"]
    for item in (*SMALL, *sets):
        found += ["--set", item]
    return [str(item) for item in found]


def broken_off(text: Path, out: Path, *signals: int) -> int:
    """Exit code of a training that gets the signals in its second step and says how to go on."""
    process = subprocess.Popen(
        [sys.executable, "cli.py", *train_arguments(text, out, "steps=100000", "log_every=1")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            for number in signals:
                process.send_signal(number)
            break
    rest = process.stderr.read()
    assert rest.splitlines()[-1] == f"stopped; go on with: bitskip train --resume --out {out}"
    return process.wait()


def test_train_then_evaluate(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*train_arguments(text, out, "steps=3")).exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "best.pt", "config.toml", "history.jsonl", "last.pt",
    ]  # fmt: skip
    arguments = ["evaluate", out / "last.pt", "--text", text, "--token-cache", tmp_path / "cache"]
    result = run(*arguments, "--exit-layer", "1,4", "--json")
    figures = json.loads(result.stdout)
    assert (figures["context"], figures["stride"], figures["bypass"]) == (16, 16, "none")
    assert [e["exit_layer"] for e in figures["exits"]] == [1, 4]
    lines = run(*arguments, "--bypass", "weights").stdout.splitlines()
    assert "context and stride 16, bypass weights" in lines[0]
    assert len(lines) == 3
    refused = run(*arguments, "--exit-layer", "9")
    assert refused.exit_code == 1
    assert refused.stderr == "error: exit layer 9: must be within 1..4\n"
    assert run(*arguments, "--exit-layer", "all").exit_code == 2


def test_ctrl_c_saves_and_resume_goes_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert broken_off(text, out, signal.SIGINT) == 130
    step = load_checkpoint(out / "last.pt").step
    assert step >= 2
    assert not list(out.glob("*.tmp"))
    # A new run must not write over this one; resuming keeps the settings but for what --set says.
    result = run(*train_arguments(text, out))
    assert (result.exit_code, "add --resume" in result.stderr) == (1, True)
    resume = ["train", "--resume", "--out", out, "--token-cache", tmp_path / "cache"]
    result = run(*resume, "--no-tensorboard", "--set", f"steps={step + 1}")
    assert result.exit_code == 0, result.stderr
    assert load_checkpoint(out / "last.pt").step == step + 1
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [e["step"] for e in history if "loss" in e] == list(range(1, step + 2))
    for wrong, message in (
        (["--preset", "tiny"], "takes its settings from"),
        (["--set", "hidden_size=32"], "the model's settings cannot change"),
        (["--set", "tokenizer=bpe:280"], "tokenizer cannot change"),
        (["--set", "init=public"], "init cannot change"),
    ):
        result = run(*resume, *wrong)
        assert (result.exit_code, message in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["rate=1"], "--set rate=1: unknown setting 'rate'"),
        (["steps=1.5"], "steps = 1.5: must be of type int"),
        (["vocab_size=280"], "tokenizer has 300 tokens, the model 280: --set model.vocab_size=300"),
        (["tokenizer=nothing"], "no such file"),
        (["context=4000", "max_position_embeddings=4000"], "needs at least 4001"),
    ],
)
def test_mistakes_are_one_line(text: Path, tmp_path: Path, sets: list[str], message: str) -> None:
    result = run(*train_arguments(text, tmp_path / "run", *sets))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_missing_arguments(text: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert "--preset, --config or --from is missing" in run("train", "--out", out).stderr
    assert "no such file" in run("train", "--out", out, "--resume").stderr
    assert "hub names" in run("train", "--preset", "tiny", "--data", "x", "--out", out).stderr
    assert "does not exist" in run("evaluate", tmp_path / "a.pt", "--text", text).stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['cli.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('cli.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'onnx', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
