"""`import`, `export --to hf`, and other programs' models given to any verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bitskip.program import main
from bitskip_export.foreign import convert, opened, verbs
from bitskip_ref import files
from bitskip_ref.compare import difference
from bitskip_ref.folder import read_folder
from tests.cli.conftest import write_model
from tests.helpers import random_folder, twin


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_there_and_back(tmp_path: Path) -> None:
    first = write_model(tmp_path / "m")
    result = run("export", first, "--to", "hf")
    assert result.exit_code == 0 and "kept: linear weights" in result.output, result.output
    result = run("import", tmp_path / "m-hf", "-o", tmp_path / "again")
    assert result.exit_code == 0 and "codes and scales (U8)" in result.output, result.output
    one, other = read_folder(first), read_folder(tmp_path / "again")
    assert "dropped: routing gates" in run("export", first, "--to", "hf", "--force").output
    assert other.config == one.config.replace(gates=False)
    assert one.eos_token_id == other.eos_token_id
    for name, t in other.tensors.items():
        assert difference(name, one.tensors[name], t) is None
    assert one.tokenizer and other.tokenizer
    assert one.tokenizer.read_text() == other.tokenizer.read_text()
    result = run("import", tmp_path / "m-hf", "-o", tmp_path / "again", "--head", "float16")
    assert result.exit_code == 0, result.output  # over what was a model
    assert read_folder(tmp_path / "again").config.head_format == "float16"


def test_errors_are_one_line(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "v3", twin("bitskip-v3"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    assert run("export", write_model(tmp_path / "m"), "--to", "hf").exit_code == 0
    for arguments, words in [
        (["export", folder, "--to", "hf"], "hadamard: a rotation before each linear"),
        (["import", folder, "-o", tmp_path / "x"], "is a model folder of bitskip already"),
        (["import", tmp_path / "none", "-o", tmp_path / "x"], "neither a Hugging Face folder, nor"),
        (["import", tmp_path / "m-hf", "-o", other], "holds files and no model"),
        (["import", other, "-o", tmp_path / "x"], "config.json: cannot be read"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1 and words in result.stderr, result.output
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "v3-hf").exists()


def test_any_verb_takes_a_foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path / "cache"))
    assert run("export", write_model(tmp_path / "m"), "--to", "hf").exit_code == 0
    first = run("inspect", tmp_path / "m-hf")
    assert first.exit_code == 0 and "converted once, kept in" in first.stderr, first.output
    (kept,) = [p for p in (tmp_path / "cache/models").iterdir() if p.is_dir()]
    again = run("inspect", tmp_path / "m-hf")
    assert again.stdout == first.stdout and again.stderr == ""
    (tmp_path / "m-hf").rename(tmp_path / "moved")  # known by its content
    assert run("inspect", tmp_path / "moved").stderr == ""
    result = run("verify", tmp_path / "moved", "--engines", "ref,torch", "--tokens", 3)
    assert result.exit_code == 0 and str(kept) in result.output, result.output
    with open(tmp_path / "moved/tokenizer.json", "a") as file:
        file.write("\n")
    assert "converted once" in run("inspect", tmp_path / "moved").stderr


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("export", write_model(tmp_path / "m"), "--to", "hf").exit_code == 0
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "m-hf")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    result = run("import", "someone/model", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert asked == [("someone/model", verbs.HUB_FILES)]
    assert not any(p.endswith((".bin", ".pt", ".py")) for p in verbs.HUB_FILES)
    assert np.isfinite(read_folder(tmp_path / "out").tensors["final_norm.weight"]).all()


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    assert run("export", model, "--to", "hf").exit_code == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = write_model(tmp_path / "other")
    before |= {p: p.read_bytes() for p in other.iterdir()}
    for arguments, words in [
        (["export", model, "--to", "hf", "-o", model, "--force"], "is what is read"),
        (["export", model, "--to", "hf", "-o", f"{tmp_path}/other/../m/"], "is what is read"),
        (["export", model, "--to", "hf", "-o", other], "no model of this kind"),
        (["import", tmp_path / "m-hf", "-o", tmp_path / "m-hf", "--force"], "is what is read"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1 and words in result.stderr, (arguments, result.output)
    assert {p: p.read_bytes() for p in before} == before
    assert run("export", model, "--to", "hf").exit_code == 0  # over what it wrote itself


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m")
    monkeypatch.chdir(model)
    assert run("export", ".", "--to", "hf").exit_code == 0
    (model / "deeper").mkdir()
    monkeypatch.chdir(model / "deeper")
    assert run("export", "..", "--to", "gguf").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m-hf", "m.gguf"]


def test_another_model_of_the_same_dates_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path / "cache"))
    assert run("export", write_model(tmp_path / "m"), "--to", "gguf").exit_code == 0
    path = tmp_path / "m.gguf"
    raw, about = path.read_bytes(), path.stat()
    first = opened.cached(path)
    name = b"output_norm.weight"
    assert name in raw
    path.write_bytes(raw[:-4] + b"\0\0\x80?")  # the last norm's last value becomes 1
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    second = opened.cached(path)
    one, other = (read_folder(p).tensors["final_norm.weight"] for p in (first, second))
    assert first != second and other[-1] == 1 and (one[:-1] == other[:-1]).all()
    for seen in (tmp_path / "cache/models").glob("seen-*"):
        seen.write_bytes(b"\xff\0/..")  # damaged: looked at anew
    assert opened.cached(path) == second


def test_a_model_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path / "cache"))
    assert run("export", write_model(tmp_path / "m"), "--to", "hf").exit_code == 0
    os.mkfifo(tmp_path / "m-hf" / "extra.json")  # no part of a model, and not waited for
    original = convert.import_model

    def change(source: Any, *words: Any, **options: Any) -> Any:
        report = original(source, *words, **options)
        (tmp_path / "m-hf" / "generation_config.json").write_text("{}")
        return report

    monkeypatch.setattr(convert, "import_model", change)
    with pytest.raises(ValueError, match="changed while it was read"):
        opened.cached(tmp_path / "m-hf")
    assert not list((tmp_path / "cache/models").iterdir())


def test_a_cache_that_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path / "cache"))
    assert run("export", write_model(tmp_path / "m"), "--to", "hf").exit_code == 0
    first = opened.cached(tmp_path / "m-hf")
    for seen in (tmp_path / "cache/models").glob("seen-*"):
        seen.unlink()

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "replace_file", refuse)
    assert opened.cached(tmp_path / "m-hf") == first
