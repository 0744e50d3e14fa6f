"""The figures of one row, and the machine's limits they are shares of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_cpu.bench.costs import cache_bytes, entropy_bytes, multiply_adds
from bitskip_cpu.bench.limits import Limits
from bitskip_cpu.bench.timing import Case


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, mean, standard deviation (0 for one sample) and the samples."""
    return {
        "median": statistics.median(samples),
        "mean": statistics.fmean(samples),
        "sd": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "samples": list(samples),
    }


def limit_figures(limits: Limits) -> list[dict[str, Any]]:
    """Per number of threads: bandwidth, and peak of multiply-adds (None on the path `plain`)."""
    return [
        {
            "threads": threads,
            "buffer_bytes": limits.size,
            "read_bytes_per_s": spread(samples),
            "multiply_adds_per_s": spread(limits.multiply[threads])
            if threads in limits.multiply
            else None,
        }
        for threads, samples in sorted(limits.read.items())
    ]


def rows_of(cases: Sequence[Case], limits: Limits) -> list[dict[str, Any]]:
    """The rows of measured cases; an early exit's gain is over the same test at full depth."""
    layers = cases[0].engine.config.num_hidden_layers
    full = {(c.task, c.threads, c.kv_cache): c for c in cases if c.exit_layer == layers}
    return [_row(c, limits, full.get((c.task, c.threads, c.kv_cache))) for c in cases]


def _row(case: Case, limits: Limits, full: Case | None) -> dict[str, Any]:
    """One row's figures; what a test does not have is None (docs/CLI.md, `bench`).

    full: the same test at full depth, if measured; an earlier exit then has a gain.
    """
    task, samples = case.task, case.samples
    speed = spread(case.tokens_per_s())
    firsts = [s.first_s for s in samples if s.first_s is not None]
    steps = [step for s in samples for step in s.steps_s]
    joules = [s.joules for s in samples if s.joules]
    gain = None
    if full is not None and full is not case:
        gain = 100 * (speed["median"] / statistics.median(full.tokens_per_s()) - 1)
    p50, p95 = (np.percentile(steps, [50, 95]) * 1e3).tolist() if steps else (None, None)
    return {
        "test": task.name,
        "prompt_tokens": task.prompt,
        "generated_tokens": task.generated,
        "depth": task.depth,
        "exit_layer": case.exit_layer,
        "threads": case.threads,
        "kv_cache": case.kv_cache,
        "tokens_per_s": speed,
        "gain_percent": gain,
        "first_token_ms": 1e3 * statistics.median(firsts) if firsts else None,
        "step_ms": {"p50": p50, "p95": p95},
        "tokens_per_joule": task.tokens / statistics.median(joules) if joules else None,
        **_reading(case, speed["median"], limits),
        **_multiplying(case, speed["median"], limits),
        "peak_rss_bytes": case.peak_rss_bytes,
    }


def _reading(case: Case, tokens_per_s: float, limits: Limits) -> dict[str, float | None]:
    """Decoding is bound by reading: what of the bandwidth it uses. None with a prompt."""
    config, task = case.engine.config, case.task
    bandwidth = limits.bytes_per_s(case.threads)
    result: dict[str, float | None] = dict.fromkeys(
        ("roofline", "read_bytes_per_token", "read_bytes_per_s", "read_share")
    )
    if task.prompt:
        return result
    positions = task.depth + (task.generated + 1) / 2  # mean length of the cache, itself included
    read = case.engine.greedy_bytes(case.exit_layer)  # type: ignore[attr-defined]
    read += cache_bytes(config, case.exit_layer, positions, case.kv_cache)
    result["read_bytes_per_token"] = read
    result["read_bytes_per_s"] = read * tokens_per_s
    if bandwidth:
        result["roofline"] = tokens_per_s * entropy_bytes(config, case.exit_layer) / bandwidth
        result["read_share"] = read * tokens_per_s / bandwidth
    return result


def _multiplying(case: Case, tokens_per_s: float, limits: Limits) -> dict[str, float | None]:
    """Prompts are bound by multiplying: what of the peak they reach. None with decoding."""
    result: dict[str, float | None] = dict.fromkeys(("multiply_adds_per_s", "int8_share"))
    task = case.task
    products = multiply_adds(case.engine.config, case.exit_layer, task.prompt)
    if task.generated or not products:
        return result
    done = result["multiply_adds_per_s"] = products * tokens_per_s / task.prompt
    peak = limits.multiply_adds_per_s(case.threads)
    if peak:
        result["int8_share"] = done / peak
    return result
