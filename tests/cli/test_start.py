"""Starting up: what is imported, what is compiled where, what the doctor says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bitskip.program import runtime as main
from bitskip_cpu import models
from bitskip_cpu.compiling import ARGUMENTS, KERNELS
from tests.cli.conftest import command

HEAVY = ("numpy", "numba", "torch", "tokenizers", "rich", "psutil", "matplotlib")


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from bitskip.program import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_the_package_is_light_until_it_loads() -> None:
    code = f"import bitskip_cpu, sys; assert not set({HEAVY!r}) & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_runtime_needs_no_torch(folder: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = sys.modules["onnxruntime"] = None
import bitskip_cpu
assert bitskip_cpu.load({str(folder)!r}).generate("Once", max_tokens=2).token_ids
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_every_verb_has_help() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        verb = main.get_command(context, name)
        assert verb and verb.help and verb.help.splitlines()[0].endswith("."), name
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("chat MODEL", "no chat_template.jinja"),
        ("generate MODEL --prompt Once --exit-layer 99", "exit layer 99"),
        ("generate MODEL --prompt Once --exit-layer auto", "no calibrated exit"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_anything_is_compiled(
    words: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("bitskip_cpu.cli.loading.prepare", compiled)
    result = CliRunner().invoke(main, words.replace("MODEL", str(folder)).split())
    assert result.exit_code == 1
    assert said in result.stderr


def test_completion_for_shells() -> None:
    environment = {**os.environ, "_BITSKIP_CPU_COMPLETE": "bash_source"}
    done = command(env=environment)
    assert "_bitskip_cpu_completion" in done.stdout


def test_without_a_cache_folder_it_still_runs(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    environment = {**os.environ, "BITSKIP_CACHE_DIR": str(blocked), "NUMBA_DISABLE_JIT": "0"}
    done = command("doctor", "--json", env=environment)
    facts = json.loads(done.stdout)
    shipped = KERNELS.shipped  # then there is nothing to keep
    lacking = facts["cache"].pop("lacking")
    assert facts["cache"] == {"folder": None, "writable": False, "warm": shipped}
    assert lacking == ([] if shipped else [*ARGUMENTS])
    assert any("BITSKIP_CACHE_DIR" in p for p in facts["problems"]) != shipped
    assert done.returncode == (0 if shipped else 1)


@pytest.mark.slow
def test_generate_without_a_cache_folder(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    environment = {**os.environ, "BITSKIP_CACHE_DIR": str(blocked)}
    done = command("generate", folder, "-p", "Once", "-n", "3", env=environment)
    assert done.returncode == 0
    assert "not kept" in done.stderr


def test_doctor() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    facts = json.loads(result.stdout)
    assert result.exit_code == (1 if facts["problems"] else 0)
    assert facts.keys() == {
        "machine", "isa", "threads", "cache", "environment", "memory_available_bytes", "models",
        "problems",
    }  # fmt: skip
    assert facts["isa"]["path"] in facts["isa"]["available"]
    assert [m["name"] for m in facts["models"]] == models.names()
    plain = CliRunner().invoke(main, ["doctor"])
    assert plain.exit_code == result.exit_code
    assert facts["machine"]["cpu"] in plain.stdout


@pytest.mark.parametrize(
    ("lacking", "said"),
    [(0, "kernels are ready"), (1, "others when first needed"), (None, "not compiled yet")],
)
def test_doctor_tells_which_kernels_are_compiled(
    lacking: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KERNELS, "lacking", lambda: [*ARGUMENTS][:lacking])
    assert said in CliRunner().invoke(main, ["doctor"]).stdout


def test_doctor_finds_a_damaged_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "names", lambda: ["broken"])
    monkeypatch.setattr(models, "path", lambda name: folder.parent / "nowhere")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "problem   model broken: no model folder" in result.stdout


def test_names_of_models(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "names", lambda: ["stories-24"])
    assert models.resolve() == models.path() == models.resolve("stories-24")
    assert models.resolve(str(folder)) == folder
    with pytest.raises(ValueError, match=r"did you mean stories-24\?"):
        models.resolve("storeys-24")
    with pytest.raises(ValueError, match="'other'"):
        models.path("other")
    # A folder of that name, here, wins over the shipped one.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories-24").mkdir()
    assert models.resolve("stories-24") == Path("stories-24")
