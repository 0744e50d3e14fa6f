"""`python cli.py export` and `verify`, and the mistakes that verify must see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bitskip.program import main
from bitskip_export import verify as checks
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine
from bitskip_ref.folder import read_folder, write_folder
from bitskip_ref.packing import pack_ternary, unpack_ternary
from tests.cli.conftest import write_model
from tests.export.test_pack import CONFIG, write_checkpoint
from tests.helpers import random_folder, random_tensors, twin

ROOT = Path(__file__).parents[2]


def run_export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *(str(a) for a in arguments)])


def run_verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *(str(a) for a in arguments)])


# ---- export ---------------------------------------------------------------------------


def test_a_checkpoint_becomes_a_folder_of_its_name(tmp_path: Path) -> None:
    result = run_export(write_checkpoint(tmp_path / "best.pt"), "--head", "float32")
    assert result.exit_code == 0, result.output
    assert read_folder(tmp_path / "best").config == CONFIG.replace(head_format="float32")
    assert "per weight" in result.output and "sparsest" in result.output


def test_graphs_of_a_checkpoint_and_of_a_folder(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.pt")
    result = run_export(checkpoint, "--to", "onnx", "--exit-layer", "2,4")
    assert result.exit_code == 0, result.output
    names = {"exit-2.onnx", "exit-4.onnx"}
    assert {p.name for p in (tmp_path / "a-onnx").glob("*.onnx")} == names
    assert run_export(checkpoint).exit_code == 0
    result = run_export(tmp_path / "a", "--to", "onnx", "-o", tmp_path / "graphs")
    assert result.exit_code == 0, result.output
    assert [p.name for p in (tmp_path / "graphs").glob("*.onnx")] == ["exit-4.onnx"]


def test_errors_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    bad = write_checkpoint(tmp_path / "bad.pt", **{"final_norm.weight": np.full(48, np.nan, "f4")})
    folder = random_folder(tmp_path / "m", CONFIG)
    (tmp_path / "text.pt").write_text("hello")
    for arguments, words in [
        ([bad], "final_norm.weight"),
        ([tmp_path / "text.pt"], "not a checkpoint"),
        ([tmp_path / "absent.pt"], "no such checkpoint"),
        ([folder], "choose --to onnx or hf"),
        ([folder, "--to", "folder"], "is for checkpoints"),
        ([folder, "--to", "onnx", "--head", "int8"], "--head is for checkpoints"),
        ([folder, "--to", "onnx", "--exit-layer", "9"], "exit layer 9 is out of range"),
        ([folder, "--to", "onnx", "--exit-layer", "0"], "0 is not in the range x>=1"),
        ([folder, "--to", "hf", "--exit-layer", "1,2"], "several exits is for --to onnx"),
        ([folder, "--to", "hf", "--kv-cache", "float16"], "--kv-cache is for --to onnx"),
        ([bad, "--exit-layer", "2"], "is for --to onnx or hf"),
        (["stories-24", "--to", "hf"], "comes with the package"),
        ([bad, "-o", tmp_path], "holds files and no model"),
    ]:
        result = run_export(*arguments)
        assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
        assert words in result.output.replace("\n", " "), result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pt", "m", "text.pt"]
    assert not (folder / "onnx").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['cli.py', 'export', '--help']; import cli, atexit;"
        "atexit.register(lambda: print(sorted({'torch', 'onnx', 'onnxruntime', 'numba'}"
        " & sys.modules.keys()))); cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Write MODEL, a checkpoint" in result.stdout and result.stdout.endswith("[]\n"), (
        result.stderr
    )


# ---- verify ---------------------------------------------------------------------------


def test_verify_says_ok(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "m", twin("bitskip-v3"))
    options = [folder, "--engines", "ref,torch,onnx", "--exit-layer", "1,4", "--tokens", 5]
    result = run_verify(*options)
    assert result.exit_code == 0, result.output
    assert result.output.count(" OK\n") == 2 * 2 + 2 * 2 * 2 * 2  # exits, modes; threads, engines
    result = run_verify(*options, "--engines", "ref,torch,onnx,numba", "--kv-cache", "float16")
    assert result.exit_code == 0, result.output
    assert result.output.count(" OK\n") == 2 * 2 + 3 * 2 * 2 * 2
    assert "reference, float16 KV cache" in result.output


def test_verify_holds_float32_models_to_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_folder(tmp_path / "m", twin("layerskip"))
    arguments = [folder, "--engines", "torch,onnx", "--threads", "1", "--tokens", 5]
    result = run_verify(*arguments)
    assert result.exit_code == 0 and "OK" not in result.output, result.output
    assert result.output.count("within 1e-05\n") == 2 * 3 * 2  # engines, exits, modes
    result = run_verify(*arguments, "--kv-cache", "float16")
    assert result.output.count("within 0.001\n") == 2 * 3 * 2, result.output
    result = run_verify(*arguments, "--kv-cache", "int8")
    assert result.output.count("within 0.01\n") == 2 * 3 * 2, result.output
    tensors = random_tensors(twin("layerskip"))
    tensors["layers.0.o_proj.weight"][5] *= np.float32(1.001)
    write_folder(tmp_path / "other", twin("layerskip"), tensors)
    load = checks.ENGINES["onnx"]
    monkeypatch.setitem(checks.ENGINES, "onnx", lambda _, *a: load(tmp_path / "other", *a))
    result = run_verify(*arguments)
    assert result.exit_code == 1 and "the bound is 1e-05" in result.output


def test_verify_of_a_prompt(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    result = run_verify(folder, "--engines", "onnx", "--prompt", "Once upon", "--threads", "1")
    assert result.exit_code == 0, result.output
    folder = random_folder(tmp_path / "n", CONFIG)
    result = run_verify(folder, "--prompt", "Once upon")
    assert result.exit_code == 1 and "no tokenizer" in result.output


def tampered(path: Path, config: ModelConfig, name: str) -> Path:
    """A folder with one code of one weight, or one scale or norm weight, changed the least."""
    tensors = random_tensors(config)
    if name.endswith("_proj.weight"):
        codes = unpack_ternary(tensors[name], config.hidden_size)
        codes[7, 11] = 0 if codes[7, 11] else 1
        tensors[name] = pack_ternary(codes)
    else:
        tensors[name].reshape(-1)[0] = np.nextafter(tensors[name].reshape(-1)[0], np.float32(9))
    write_folder(path, config, tensors)
    return path


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("layers.1.q_proj.weight", "block 2 of 4, layers.1.q"),
        ("layers.2.v_proj.scale", "block 3 of 4, layers.2.v"),
        ("layers.2.up_proj.weight", "block 3 of 4, layers.2.act"),
        ("layers.3.o_proj.scale", "block 4 of 4, layers.3.mid"),
        ("final_norm.weight", "exit_norm"),
        ("lm_head.scale", "logits"),
    ],
)
def test_verify_names_the_stage_of_a_planted_mistake(
    name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = twin("bitskip-v1")
    folder = random_folder(tmp_path / "m", config)
    other = tampered(tmp_path / "other", config, name)
    load = checks.ENGINES["onnx"]
    monkeypatch.setitem(checks.ENGINES, "onnx", lambda _, *rest: load(other, *rest))
    arguments = [folder, "--engines", "onnx", "--exit-layer", "4", "--threads", "1"]
    result = run_verify(*arguments, "--tokens", 4)
    assert result.exit_code == 1
    assert result.output.count("DIFFERS") == 2 and " OK" not in result.output
    line = next(line for line in result.output.splitlines() if stage in line)
    assert line.strip().startswith(f"{stage}: ") and "first [" in line and "(0x" in line


def test_verify_sees_a_stage_that_is_not_reported(tmp_path: Path) -> None:
    expected = {"embed": np.zeros(3, np.float32), "logits": np.zeros(3, np.float32)}
    config = twin("tiny")
    report = checks.first_difference(config, expected, {"logits": expected["logits"]})
    assert report == "embed: not reported"


def test_a_missing_engine_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path, threads: int, kv_cache: str) -> Engine:
        raise ModuleNotFoundError("No module named 'x'", name="onnxruntime")

    folder = random_folder(tmp_path / "m", twin("tiny"))
    for name in ("torch", "numba", "onnx"):
        monkeypatch.setitem(checks.ENGINES, name, absent)
    result = run_verify(folder, "--tokens", 2)
    assert result.exit_code == 1 and result.output.count("not compared: onnxruntime") == 3
    assert result.stdout.endswith("6 of 6 comparisons hold\n")
    assert "not compared: torch, numba, onnx; --engines ref says" in result.stderr
    result = run_verify(folder, "--tokens", 2, "--engines", "onnx")
    assert (
        result.exit_code == 1
        and "onnxruntime is " in result.stderr
        and 'pip install "bitskip[onnx]"' in result.stderr
    )


def test_verify_errors_are_one_line(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "m", twin("tiny"))
    for arguments, words in [
        ([tmp_path / "absent"], "no model folder"),
        ([folder, "--engines", "jax"], "unknown engine 'jax'; known: ref, torch, numba, onnx"),
        ([folder, "--exit-layer", "5"], "exit layer 5 is out of range"),
        ([folder, "--tokens", "65"], "exceed the context of 64"),
    ]:
        result = run_verify(*arguments)
        assert result.exit_code in (1, 2) and words in result.output, result.output
