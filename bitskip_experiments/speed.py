"""The speed columns: decoding by the runtime, and the FP32 twin by other runtimes, in turns.

Speed depends on shapes, not on weights: the papers' shape runs on random weights. The twins that
were trained run beside it, as exported.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.environment import commit, environment
from bitskip_experiments.results import speed_path
from bitskip_experiments.runs import Run
from bitskip_experiments.tables import number
from bitskip_ref.config import preset
from bitskip_ref.files import replace_file

PRESETS = {
    "BitSkip-V1": "bitskip-v1", "BitSkip-V2": "bitskip-v2", "BitSkip-V3": "bitskip-v3",
    "Llama3 FP32": "llama3",
}  # fmt: skip
EXITS = (6, 12, 18, 24)
TOKENS = 64
FP32_TOKENS = 16  # at the papers' shape each reads 4.2 GB
Say = Callable[[str], None]


@dataclass
class Contestant:
    """A model on a runtime."""

    shape: str  # paper or twin
    label: str
    runtime: str
    engine: Any
    tokens: int


def measure_speed(
    experiment: Experiment, runs: list[Run], results: Path, threads: int, repetitions: int, say: Say
) -> None:
    """Write speed.json and speed.md of an experiment. runs: the trained twins, of one seed."""
    rows = []
    for group in (_papers_shape, _twins):
        contestants = list(group(runs, threads, say))
        rows += _in_turns(contestants, repetitions, say)
        contestants.clear()
        gc.collect()
    ours = [r for r in rows if r["shape"] == "paper" and r["runtime"] == "bitskip-cpu"]
    table: dict[str, dict[str, float]] = {}
    for row in ours:
        table.setdefault(row["label"], {})[str(row["exit_layer"])] = row["tokens_per_s"]["median"]
    values = {
        "rows": rows, "table": table, "threads": threads, "commit": commit(),
        "environment": environment(),
    }  # fmt: skip
    path = speed_path(results, experiment)
    with replace_file(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())
    with replace_file(path.with_name("speed.md")) as file:
        file.write(speed_page(values).encode())
    say(str(path.with_name("speed.md")))


def _papers_shape(runs: list[Run], threads: int, say: Say) -> Iterator[Contestant]:
    """Random weights; FP32 by us and by transformers on the same arrays."""
    from bitskip_cpu.engine import Engine
    from bitskip_cpu.weights import random_tensors
    from bitskip_experiments.llama import LlamaEngine

    for label, name in PRESETS.items():
        say(f"making {name} with random weights")
        config = preset(name)
        tensors = random_tensors(config, 0)
        fp32 = config.linear == "float32"
        count = FP32_TOKENS if fp32 else TOKENS
        engine = Engine(config, tensors, threads)
        yield Contestant("paper", label, "bitskip-cpu", engine, count)
        if fp32:
            yield Contestant(
                "paper", label, "transformers (torch)", LlamaEngine(config, tensors, threads), count
            )


def _twins(runs: list[Run], threads: int, say: Say) -> Iterator[Contestant]:
    """The trained twins, exported: by us and by ONNX Runtime; the FP32 one by transformers too.

    One thread: they live in cache, and waking a second costs more than it gives.
    """
    from bitskip_cpu.engine import Engine
    from bitskip_experiments.llama import LlamaEngine
    from bitskip_export.onnx_engine import load_onnx
    from bitskip_export.pack import export_checkpoint
    from bitskip_ref.folder import read_folder

    for run in runs:
        if not run.trained:
            say(f"{run.name}: not trained yet, left out")
            continue
        folder = run.folder / "exported"
        export_checkpoint(run.folder / "last.pt", folder, force=True)
        model = read_folder(folder)
        label = run.point.label
        yield Contestant(
            "twin", label, "bitskip-cpu", Engine(model.config, model.tensors, 1), TOKENS
        )
        yield Contestant("twin", label, "onnxruntime", load_onnx(folder, threads=1), TOKENS)
        if model.config.linear == "float32":
            engine = LlamaEngine(model.config, model.tensors, 1)
            yield Contestant("twin", label, "transformers (torch)", engine, TOKENS)


def _in_turns(contestants: list[Contestant], repetitions: int, say: Say) -> list[dict[str, Any]]:
    """A row for each contestant and exit. All run once unmeasured, then in turns."""
    from bitskip_cpu.bench.rows import spread
    from bitskip_cpu.bench.timing import Case, Task
    from bitskip_cpu.cli.loading import prepare

    prepare()
    rng = np.random.default_rng(0)
    cases = []
    for contestant in contestants:
        ids = rng.integers(0, contestant.engine.config.vocab_size, contestant.tokens).tolist()
        cache = contestant.engine.new_cache()
        for n in EXITS:
            case = Case(Task(0, contestant.tokens), n, contestant.engine)
            cases.append((contestant, case, cache, ids))
    for number_of_round in range(-1, repetitions):
        say("warm-up" if number_of_round < 0 else f"round {number_of_round + 1} of {repetitions}")
        for _, case, cache, ids in cases:
            sample = case.run(cache, ids)
            if number_of_round >= 0:
                case.samples.append(sample)
    return [
        {
            "shape": c.shape, "label": c.label, "runtime": c.runtime, "exit_layer": case.exit_layer,
            "threads": c.engine.threads, "tokens": c.tokens,
            "tokens_per_s": spread(case.tokens_per_s()),
        }
        for c, case, _, _ in cases
    ]  # fmt: skip


def speed_page(values: dict[str, Any]) -> str:
    """speed.md: a table for each shape."""
    lines = ["# Decoding speed by runtime", ""]
    titles = {
        "paper": "The papers' shape: 24 layers, hidden size 2,048, random weights",
        "twin": "The trained twins: 24 layers, hidden size 64",
    }
    for shape, title in titles.items():
        rows = [row for row in values["rows"] if row["shape"] == shape]
        if not rows:
            continue
        lines += [f"## {title}", "", "| model | runtime | threads | tokens timed | "
                  + " | ".join(f"exit {n}" for n in EXITS) + f" | gain at {EXITS[-2]} |",
                  "|---|---|---:|---:|" + "---:|" * (len(EXITS) + 1)]  # fmt: skip
        for key in dict.fromkeys((r["label"], r["runtime"]) for r in rows):
            mine = [r for r in rows if (r["label"], r["runtime"]) == key]
            by_exit = {r["exit_layer"]: r["tokens_per_s"]["median"] for r in mine}
            speeds = [number(by_exit[n]) for n in EXITS]
            gain = f"{by_exit[EXITS[-2]] / by_exit[EXITS[-1]] - 1:+.1%}"
            first = mine[0]
            texts = [*key, str(first["threads"]), str(first["tokens"]), *speeds, gain]
            lines.append("| " + " | ".join(texts) + " |")
        lines.append("")
    machine = values["environment"]
    rounds = len(values["rows"][0]["tokens_per_s"]["samples"])
    lines += [
        f"Tokens a second when decoding, medians of {rounds} rounds in turns; "
        f"{machine['cpu']}, {machine['usable_cores']} cores; commit {str(values['commit'])[:8]}.",
        "FP32 is Llama3 without exit training: by our own FP32 path, by the Llama class of "
        "transformers on the same weights, and, at the twin's size, by our graph on ONNX Runtime "
        "(at the papers' size it would hold the 4.2 GB three times).",
    ]
    return "\n".join(lines) + "\n"
