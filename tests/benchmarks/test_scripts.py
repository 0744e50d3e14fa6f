"""The benchmark scripts that no other test runs: each, small, to its last line; never a speed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    batches,
    exit_blocks,
    exits_bound,
    fetch,
    gguf_out,
    heads,
    hf_out,
    kv_cache,
    many,
    onnx_graph,
    speculate,
    start,
)
from bitskip_cpu import isa
from bitskip_ref.config import small_twin
from tests.helpers import random_folder

TEXT = "Once upon a time there was a little dog who liked to run and play in the park. " * 8


def lines(
    module: object, arguments: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:  # fmt: skip
    """What a script prints."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    module.main()  # type: ignore[attr-defined]
    return capsys.readouterr().out.strip().split("\n")


def test_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(batches, "tiny -t 1,2 -b 1,3 -d 5 -r 1", monkeypatch, capsys)
    rows = [line.split("|")[1].strip() for line in out if line.startswith("| ")]
    assert rows.count("1") == rows.count("3") == 2  # a table for one thread, one for two


def test_exits_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed, untrained = {1: 4.0, 2: 3.0, 4: 2.0}, {1: 3.0, 2: 2.9, 3: 2.0}
    same = exits_bound.mixture(2.5, fixed, pairwise(fixed))
    assert same is not None and same == (2, 4, 0.5) and same.depth == 3.0
    assert exits_bound.mixture(1.5, fixed, pairwise(fixed)) is None
    near = exits_bound.mixture(2.95, untrained, pairwise(untrained))
    assert near == (1, 2, pytest.approx(0.5))
    coin = exits_bound.mixture(2.5, untrained, combinations(untrained, 2))
    assert coin is not None and coin == (1, 3, 0.5) and coin.of({1: 1, 3: 5}) == 3
    stops = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]], bool)
    assert exits_bound.stopped_at(stops, (1, 2), 4).tolist() == [1, 2, 4]
    costs = {"shape": exits_bound.Costs(2.0, 1.0, 0.5, 0.25, 0.1)}
    depths = np.array([1, 2, 4])
    row = exits_bound.facts("", depths, 2.5, (1, 2), 4, {1: 4.0, 2: 3.0, 4: 2.0}, costs)
    mean, looks = 7 / 3, 5 / 3
    parts = [2 + mean, 2 + mean + (4 - mean) / 4, 2 + mean + (4 - mean) / 4 + looks / 2]
    assert row["shape"] == pytest.approx([p / 5 for p in parts])
    (tmp_path / "text").write_text(TEXT * 4)
    arguments = f"--text {tmp_path / 'text'} --tokens 300 --rounds 1 --thresholds 0.01,0.99 "
    arguments += f"--impose stories-24 -o {tmp_path / 'found.json'}"
    out = lines(exits_bound, arguments, monkeypatch, capsys)
    assert out[0].startswith("stories-24: a block ") and "gate > 0.99 at 6, else 12" in out[-1]
    assert json.loads((tmp_path / "found.json").read_text())["tokens"] > 300


def test_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_folder(tmp_path / "model", small_twin("bitskip-v1"))
    ours, other = isa.PATH.fetch, isa.Fetch(ternary=(0, 0), codes=(0, 0))
    tried = {replace(given, name="") for given in fetch.SETTINGS.values()}
    assert {replace(given, name="") for given in isa.FETCHES.values()} <= tried
    monkeypatch.setattr(fetch, "SETTINGS", {"none": other})
    out = lines(fetch, f"{folder} -n 2 -r 2", monkeypatch, capsys)
    setting, *speeds = (cell.strip() for cell in out[-1].split("|")[1:-1])
    assert setting == "none" and [len(cell.split(",")) for cell in speeds] == [2, 2]
    assert isa.PATH.fetch == ours  # tried in other processes


def test_heads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(heads, "--preset tiny -t 1 -r 1", monkeypatch, capsys)
    assert [line.split()[1] for line in out[-3:]] == ["int8", "int6", "int4"]


def test_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny-TQ2_0-Q6_K.gguf").touch()
    peer = tmp_path / "llama-batched-bench"  # which says nothing of the model
    said = [f'{{"pl": {n}, "speed_tg": {n}.5}}' for n in (1, 3)]
    peer.write_text("#!/bin/sh\necho loading\n" + "".join(f"echo '{line}'\n" for line in said))
    peer.chmod(0o755)
    words = f"--preset tiny -t 1 --sequences 3 --depth 5 --steps 2 -r 2 --models {tmp_path}"
    plain = lines(many, f"{words} --kv-cache int8", monkeypatch, capsys)
    beside = lines(many, f"{words} --llama-batched-bench {peer}", monkeypatch, capsys)
    for out, columns in ((plain, 4), (beside, 7)):
        cells = [line.split("|")[1:-1] for line in out if line.startswith("|")]
        assert {len(row) for row in cells} == {columns}
        assert [row[0].strip() for row in cells if row[0].strip().isdigit()] == ["1", "3"]
    assert "2.33 (2.33 to 2.33)" in "".join(beside)  # 3.5 over 1.5


def test_gguf_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in ("llama-completion", "llama-perplexity"):  # which say nothing of the model
        (tmp_path / tool).write_text("#!/bin/sh\necho 'Final estimate: PPL = 1.5'\n")
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "text").write_text(TEXT * 4)
    with pytest.raises(SystemExit, match="1"):  # the bars are not met
        lines(gguf_out, f"--llama {tmp_path} --text {tmp_path / 'text'}", monkeypatch, capsys)
    out = capsys.readouterr().out.splitlines()
    assert "prompts of 4 words: 0 of 1 texts agree" in out
    assert out[-2].startswith("texts: 0 of 3") and "1.5000 there" in out[-1]


def test_hf_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # which transformers demands for ternary models
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(hf_out, "SAME", 1.1)  # the bar is not met
    with pytest.raises(SystemExit, match="1"):
        lines(hf_out, f"--text {tmp_path / 'text'} --tokens 100", monkeypatch, capsys)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("100 tokens: the same top-1 in ") and len(out) == 3
    assert float(out[0].split("in ")[1].split("%")[0]) > 90


def test_kv_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = f"--text {tmp_path / 'text'} --exits 2,4 --tokens 40 -o {tmp_path / 'out.json'}"
    out = lines(kv_cache, arguments, monkeypatch, capsys)
    assert [line.split()[1] for line in out[2:]] == ["float32", "float16", "int8"]
    assert "\n".join(out) == kv_cache.render(json.loads((tmp_path / "out.json").read_text()))


def test_the_documented_losses_are_those_measured() -> None:
    root = Path(__file__).parent.parent.parent
    facts = json.loads((root / "results" / "kv-cache" / "stories-24.json").read_text())
    assert kv_cache.render(facts) in (root / "docs" / "PERFORMANCE.md").read_text()


def test_onnx_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_folder(tmp_path / "model", small_twin("bitskip-v1"))
    out = lines(onnx_graph, f"{folder} -p 4 -n 2", monkeypatch, capsys)
    assert {name for name, speed in json.loads(out[-1]).items() if speed > 0} == {"pp4", "tg2"}


def test_speculate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("\n<|endoftext|>\n".join([TEXT] * 3))
    arguments = f"--text {text} --prompts 2 --prompt-tokens 6 -n 8 --speculate 1,auto,lookup -r 1"
    out = lines(
        speculate, f"{arguments} --draft-vocab 1024 --impose stories-24", monkeypatch, capsys
    )
    cases = [line for line in out if line.startswith(("| K ", "| plain", "| lookup"))]
    same = [line.split("|")[-2].strip() for line in cases]
    assert same[:4] == ["2"] * 4  # texts of plain, lookup, K 1 and auto; then those imposed


@pytest.mark.slow
@pytest.mark.skipif(isa.INTERPRETED, reason="nothing is compiled")
def test_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(start, "-r 1", monkeypatch, capsys)
    assert [line.split(":")[0] for line in out] == [
        "cold, compiling", "warm", "import numba", "import numpy, llvmlite.binding",
    ]  # fmt: skip


def test_exit_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measures a folder, and the table is that of what is kept."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    words = f"shipped=stories-24 --text {text} -o {out} --exits 2,6 --prompts 1 -n 4"
    lines(exit_blocks, words, monkeypatch, capsys)
    kept = json.loads((out / "figures.json").read_text())
    assert (out / "table.md").read_text() == exit_blocks.page(kept)
    assert kept["shipped"]["exits"]["6"]["work"] == 6 and kept["shipped"]["blocks"] == []


def test_the_committed_table_of_exit_blocks() -> None:
    results = Path(__file__).parent.parent.parent / "results/exit-blocks"
    kept = json.loads((results / "figures.json").read_text())
    assert (results / "table.md").read_text() == exit_blocks.page(kept)
