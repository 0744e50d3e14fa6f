"""Speed of prompt processing and of decoding, as llama-bench counts them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitskip_cpu import isa, models
from bitskip_cpu.engine import Engine as NumbaEngine
from bitskip_cpu.machine import fingerprint, peak_rss_bytes
from bitskip_cpu.tables import size, table
from bitskip_cpu.threads import default_threads
from bitskip_cpu.weights import random_tensors
from bitskip_ref.config import preset as preset_config
from bitskip_ref.engine import Engine
from bitskip_ref.exits import FixedExit
from bitskip_ref.folder import read_folder


@dataclass
class Case:
    """One row: a test at an exit with a number of threads, and its samples."""

    test: str  # pp<n>: a prompt of n tokens in one call; tg<n>: n single-token steps
    tokens: int
    exit_layer: int
    threads: int
    tokens_per_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)  # every decoding step of every sample
    peak_rss_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """The row as it is printed; `latency_ms` only for decoding."""
        samples = self.tokens_per_s
        row: dict[str, Any] = {
            "test": self.test,
            "exit_layer": self.exit_layer,
            "threads": self.threads,
            "tokens_per_s": {
                "mean": statistics.fmean(samples),
                "sd": statistics.stdev(samples) if len(samples) > 1 else 0.0,
                "samples": samples,
            },
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        if self.step_s:
            p50, p95 = np.percentile(self.step_s, [50, 95]) * 1e3
            row["latency_ms"] = {"p50": float(p50), "p95": float(p95)}
        return row

    def run(self, engine: Engine, rng: np.random.Generator) -> tuple[float, list[float]]:
        """One sample from an empty cache: (tokens/s, seconds of each decoding step)."""
        ids = rng.integers(0, engine.config.vocab_size, self.tokens).tolist()
        cache, rule = engine.new_cache(), FixedExit(self.exit_layer)
        steps = []
        start = time.perf_counter()
        if self.test.startswith("pp"):
            engine.extend(ids, cache, exit_layer=self.exit_layer, last_only=True)
        else:
            for token in ids:
                before = time.perf_counter()
                engine.step(token, cache, rule)
                steps.append(time.perf_counter() - before)
        return self.tokens / (time.perf_counter() - start), steps


def bench(
    engine_for: Callable[[int], Engine],
    *,
    prompts: Sequence[int],
    generated: Sequence[int],
    threads: Sequence[int],
    exits: Sequence[int],
    repetitions: int,
    report: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of every test at every exit and number of threads; random tokens.

    Each case runs once before it is measured, so that compiling and page faults stay out. The
    repetitions of a thread count's cases alternate, so that a slow minute hits all of them.
    engine_for: makes an engine of that many threads. peak_rss_bytes is the process's peak by the
    end of the row's samples. Raises ValueError for tests that do not fit the context.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions {repetitions}: must be at least 1")
    tests = [("pp", n) for n in prompts if n] + [("tg", n) for n in generated if n]
    if not tests:
        raise ValueError("nothing to measure: give -p or -n a number above 0")
    rows = []
    for count in threads:
        engine = engine_for(count)
        context = engine.config.max_position_embeddings
        cases = [Case(f"{kind}{n}", n, e, count) for kind, n in tests for e in exits]
        for case in cases:
            FixedExit(case.exit_layer).check(engine.config)
            if not 0 < case.tokens <= context:
                raise ValueError(f"{case.test}: needs 1..{context} tokens, the model's context")
        for number in range(repetitions + 1):
            report(f"{count} threads: {f'{number} of {repetitions}' if number else 'warm-up'}")
            for case in cases:
                speed, steps = case.run(engine, np.random.default_rng(seed))
                if number:
                    case.tokens_per_s.append(speed)
                    case.step_s += steps
                    case.peak_rss_bytes = peak_rss_bytes()
        rows += [case.row() for case in cases]
    return rows


def report(
    model: str | None,
    preset: str | None,
    *,
    prompts: Sequence[int],
    generated: Sequence[int],
    threads: Sequence[int] | None,
    exits: Sequence[int] | None,
    repetitions: int,
    seed: int,
    as_json: bool,
    note: Callable[[str], None],
) -> str:
    """What `bitskip-cpu bench` prints; progress goes to `note`. Raises ValueError."""
    if preset is None:
        folder = read_folder(models.resolve(model))
        name, config, tensors = str(folder.path), folder.config, folder.tensors
    else:
        name, config = f"{preset} (random weights, seed {seed})", preset_config(preset)
        tensors = random_tensors(config, seed)
    rows = bench(
        lambda count: NumbaEngine(config, tensors, count),
        prompts=prompts,
        generated=generated,
        threads=threads or [default_threads()],
        exits=exits or [config.num_hidden_layers],
        repetitions=repetitions,
        report=note,
        seed=seed,
    )
    machine = {**fingerprint(), "isa": isa.PATH}
    if as_json:
        about = {"name": name, "parameters": config.parameters(), "config": config.to_dict()}
        return json.dumps({"machine": machine, "model": about, "rows": rows})
    cells = []
    for row in rows:
        speed, latency = row["tokens_per_s"], row.get("latency_ms", {})
        cells.append(
            (
                row["test"],
                row["exit_layer"],
                row["threads"],
                f"{speed['mean']:.1f} ± {speed['sd']:.1f}",
                *(f"{latency[p]:.2f}" if latency else "" for p in ("p50", "p95")),
                size(row["peak_rss_bytes"]),
            )
        )
    header = ("test", "exit", "threads", "tokens/s", "p50 ms", "p95 ms", "peak memory")
    about_machine = f"{machine['cpu']}, {machine['usable_cores']} cores, path {isa.PATH}"
    return f"{name}\n{about_machine}\n\n{table(header, cells)}"
