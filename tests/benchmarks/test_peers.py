"""`benchmarks`: order, parsing, ratios and model files; never a speed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import peers, tables
from benchmarks.linear_layers import onnx_layers, speeds
from benchmarks.random_gguf import nearest, write
from benchmarks.runtimes import Models, Runtime, bitskip, llama_cpp, runtimes
from bitskip.program import runtime as main
from bitskip_cpu.bench import limits
from bitskip_ref.config import ModelConfig, preset, small_twin
from tests.helpers import random_folder

SMALL = small_twin("bitskip-v1").replace(
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=512,
)  # fmt: skip


# ---- model files ------------------------------------------------------------------------


def read_gguf(path: Path, config: ModelConfig, linear: str, head: str) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    write(config, linear, head, path)
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("linear", "head"), [("TQ2_0", "Q6_K"), ("TQ1_0", "F16")])
def test_a_ternary_gguf(tmp_path: Path, linear: str, head: str) -> None:
    tensors = read_gguf(tmp_path / "x.gguf", SMALL, linear, head)
    from gguf import quants

    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type.name == head and list(embedding.shape) == [256, 97]
    if head == "Q6_K":
        assert np.isfinite(quants.dequantize(embedding.data, embedding.tensor_type)).all()
    assert "output.weight" not in tensors  # the architecture ties it
    assert len(tensors) == 2 + 4 * (7 + 4)
    down = tensors["blk.3.ffn_down.weight"]
    assert down.tensor_type.name == linear and list(down.shape) == [512, 256]
    values = np.unique(quants.dequantize(down.data, down.tensor_type))
    assert len(values) == 3 and values[1] == 0 and values[0] == -values[2]


def test_a_llama_gguf_has_its_own_head(tmp_path: Path) -> None:
    tensors = read_gguf(tmp_path / "x.gguf", SMALL, "Q4_0", "Q8_0")
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_k.weight"].tensor_type.name == "Q4_0"
    assert len(tensors) == 3 + 4 * (7 + 2)


def test_the_nearest_shape() -> None:
    assert nearest(preset("bitskip-v1")) == preset("bitskip-v1")
    wt2 = nearest(preset("wt2-bitskip"))
    assert wt2.gated and wt2.intermediate_size == 1280  # of 2048 * 2 / 3 = 1365
    assert wt2.quantizable_parameters() < preset("wt2-bitskip").quantizable_parameters()
    with pytest.raises(ValueError, match="192 weights"):
        nearest(preset("stories-24"))


# ---- other runtimes' output -------------------------------------------------------------


def test_ours_is_read_from_bench_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_folder(tmp_path / "model", small_twin("bitskip-v1"))
    monkeypatch.setattr(limits, "ENOUGH", 1 << 16)
    monkeypatch.setattr(limits, "TURNS", 16)
    tests = ["-p", "4", "-n", "2"]
    runtime = bitskip(folder, preset("bitskip-v1"), tests, exits=[2, 4])
    assert runtime.entropy_bytes == pytest.approx(855_638_016 * math.log2(3) / 8)
    words = runtime.command(1)
    assert words[:3] == [sys.executable, "-m", "bitskip_cpu"]
    result = CliRunner().invoke(main, words[3:])
    rows, found = runtime.read(result.stdout)
    assert [(r["test"], r["exit_layer"]) for r in rows] == [
        ("pp4", 2), ("pp4", 4), ("tg2", 2), ("tg2", 4),
    ]  # fmt: skip
    assert all(r["tokens_per_s"] > 0 for r in rows)
    assert found and found["read_bytes_per_s"] > 0


def test_what_llama_bench_says_is_read() -> None:
    config = preset("wt2-bitskip")
    runtime = llama_cpp(Path("b"), Path("m"), "peer", config, ["-p", "512", "-n", "64"])
    assert runtime.command(2)[-2:] == ["-t", "2"]
    lines = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 80.5}, {"n_prompt": 0, "n_gen": 64}]
    lines[1]["avg_ts"] = 20.25
    rows, found = runtime.read(json.dumps(lines))
    assert found is None
    assert rows == [
        {"test": "pp512", "exit_layer": None, "tokens_per_s": 80.5},
        {"test": "tg64", "exit_layer": None, "tokens_per_s": 20.25},
    ]
    gated = 12 * (512 * (512 + 2 * 256) + 512 * 512 + 3 * 512 * 1280)  # its shape, not ours
    assert runtime.entropy_bytes == pytest.approx(gated * math.log2(3) / 8)


def test_ik_llama_cpp_gets_a_model_of_its_own_format(tmp_path: Path) -> None:
    made = Models(tmp_path, "small", SMALL)
    made.gguf("F16", "F16")
    bench, quantize = tmp_path / "bin" / "llama-bench", tmp_path / "bin" / "llama-quantize"
    bench.parent.mkdir()
    quantize.write_text(
        '#!/bin/sh\nfor last; do out=$kind; kind=$last; done\necho "$kind" >"$out"\n'
    )
    quantize.chmod(0o755)
    asked: dict[str, Any] = {"llama_bench": None, "prompt": 512, "steps": 64, "isa": None}
    with pytest.raises(ValueError, match="IQ2_BN: needs --ik-bench PATH"):
        runtimes(made, ["IQ2_BN"], ik_bench=None, **asked)
    (runtime,) = runtimes(made, ["IQ2_BN"], ik_bench=bench, **asked)
    gguf = tmp_path / "small-IQ2_BN.gguf"
    assert runtime.name == "ik_llama.cpp IQ2_BN" and gguf.read_text() == "IQ2_BN\n"
    words = runtime.command(2)
    assert words[:3] == [str(bench), "-m", str(gguf)]
    assert words[-6:] == ["-rtr", "1", "-fa", "1", "-t", "2"]
    gguf.unlink()
    quantize.write_text("#!/bin/sh\necho no such type >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="exit code 3: no such type"):
        runtimes(made, ["IQ2_BN"], ik_bench=bench, **asked)
    assert not gguf.exists()


def test_linear_layers_run_all_of_them() -> None:
    pytest.importorskip("onnxruntime")
    run = onnx_layers(SMALL, "ort-int8", 1)
    shapes = {array.shape for array in run(3)}
    assert shapes == {(3, 128), (3, 256)}  # keys and values, the last block
    calls: list[int] = []
    found = speeds(calls.append, 5, 3)
    assert calls == [5, 5, 1, 1, 1, 1]  # the first of each is a warm-up
    assert found.keys() == {"pp5", "tg3"}


# ---- turns ------------------------------------------------------------------------------


def say(name: str, text: str, code: int = 0) -> Runtime:
    """A runtime that prints a text and ends with a code."""
    script = f"import sys; print({text!r}, file=sys.{'stderr' if code else 'stdout'}); exit({code})"
    read = peers_read if not code else (lambda text: ([], None))
    return Runtime(name, lambda threads: [sys.executable, "-c", script], read, 100.0)


def peers_read(text: str) -> tuple[list[dict[str, Any]], None]:
    return [{"test": "tg4", "exit_layer": None, "tokens_per_s": float(text)}], None


def test_runtimes_alternate_and_one_that_fails_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LOOK", 0.001)
    results = peers.Results(tmp_path / "out.json", {"layers": 4})
    a, b, c = say("a", "5"), say("b", "well\nno memory", 3), say("c", "7")
    peers.measure(results, [a, b], c, [a], [1, 2], 2)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["failed"] == {"b": "b: exit code 3: no memory"}
    assert capsys.readouterr().err.count("error: b: exit code 3: no memory") == 1
    order = [("peers", "a", 1), ("exits", "c", 1), ("peers", "a", 2), ("exits", "c", 2)]
    order.append(("busy", "a", 2))
    found = [(s["round"], s["series"], s["runtime"], s["threads"]) for s in saved["samples"]]
    assert found == [(n, *turn) for n in (0, 1) for turn in order]
    assert saved["samples"][0]["tokens_per_s"] == 5 and saved["samples"][0]["others_percent"] >= 0
    with pytest.raises(RuntimeError, match="bitskip: exit code 1: broken"):
        results.take("peers", 0, say("bitskip", "broken", 1), 1)


# ---- tables -----------------------------------------------------------------------------


def sample(series: str, n: int, runtime: str, threads: int, speed: float, **more: Any) -> Any:
    row = {"series": series, "round": n, "runtime": runtime, "threads": threads}
    row |= {"test": "tg4", "exit_layer": None, "entropy_bytes": 100.0, "others_percent": 5.0}
    return {**row, "tokens_per_s": speed, **more}


FACTS: dict[str, Any] = {
    "preset": "tiny",
    "layers": 4,
    "machine": {"cpu": "a CPU", "usable_cores": 2},
    "failed": {},
    "samples": [
        *(sample("peers", n, "bitskip", 1, v, exit_layer=4) for n, v in enumerate((30, 20, 40))),
        *(sample("peers", n, "other", 1, v) for n, v in enumerate((10, 20, 10))),
        sample("peers", 0, "layers", 1, 60, entropy_bytes=None),
        *(sample("exits", n, "bitskip", 1, v, exit_layer=2) for n, v in enumerate((50, 36))),
        *(sample("exits", n, "bitskip", 1, v, exit_layer=4) for n, v in enumerate((25, 30))),
        *(sample("busy", n, "bitskip", 1, v, exit_layer=4) for n, v in enumerate((27, 24, 21))),
    ],
    "limits": [
        {"series": "peers", "threads": 1, "read_bytes_per_s": 8000.0},
        {"series": "exits", "threads": 1, "read_bytes_per_s": 6000.0},
        {"series": "busy", "threads": 1, "read_bytes_per_s": 1.0},
    ],
}


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]


def test_ratios_are_taken_round_by_round() -> None:
    header, _, *rows = cells(tables.test_table(FACTS, "tg4", [1]))
    assert header == ["runtime", "1 thread", "bitskip, times", "roofline"]
    assert rows == [  # ratios 3, 1 and 4; bandwidth 7000, that of the busy run left out
        ["bitskip", "30.0 (20.0 to 40.0)", "", "0.43"],
        ["other", "10.0 (10.0 to 20.0)", "3.00 (1.00 to 4.00)", "0.14"],
        ["layers", "60.0", "0.50", ""],
    ]


def test_gains_of_exits_and_the_busy_share() -> None:
    _, _, *rows = cells(tables.exit_table(FACTS, "tg4", [1]))
    assert rows == [
        ["2", "43.0 (36.0 to 50.0)", "60.0 (20.0 to 100.0)"],
        ["4", "27.5 (25.0 to 30.0)", ""],
    ]
    _, _, *rows = cells(tables.busy_table(FACTS, "tg4", 1))
    assert rows == [["bitskip", "24.0 (21.0 to 27.0)", "0.80"]]


def test_the_report_and_its_picture(tmp_path: Path) -> None:
    text = tables.markdown(FACTS)
    assert "tiny, a CPU, 2 cores; 3 rounds" in text
    assert "limits, threads 1: 0.0 GB/s" in text and "by exit layer" in text
    pytest.importorskip("matplotlib")
    from benchmarks.charts import draw

    draw(FACTS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
