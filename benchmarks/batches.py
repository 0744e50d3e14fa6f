"""Where the time of a batch of few tokens goes: parts in turns, beside what their bytes cost.

    python -m benchmarks.batches [PRESET] [-t 1,2] [-b 1,2,4,8] [-d DEPTH] [-r REPETITIONS]

Parts of a batch are found by leaving others out: linear layers (all rows of the blocks' products),
attention (scores to weighted values, the cache's stores), the rest of the blocks (norms,
quantizers, activation, residuals), head (final norm and logits). Medians, in ms.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from bitskip.tables import table
from bitskip_cpu.bench.limits import Limits
from bitskip_cpu.cli.loading import prepare
from bitskip_cpu.engine import Engine, random_model
from bitskip_cpu.kernels.layout import BLOCKS, EMBED, EXIT
from bitskip_ref.config import preset

PARTS = ("blocks", "head", "blocks without products", "and without attention")


class Batch:
    """So many tokens behind `depth` others on an engine's own workspace."""

    def __init__(self, engine: Engine, tokens: int, depth: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.cache = engine.new_cache()
        self.ids = np.arange(5, 5 + tokens) % engine.config.vocab_size
        if depth:
            engine.extend(list(range(1, depth + 1)), self.cache, last_only=True)
        self.logits = np.empty((tokens, engine.config.vocab_size), np.float32)

    def seconds(self, part: str) -> float:
        """Of one run of a part."""
        engine, space = self.engine, self.engine._space
        layers = engine.config.num_hidden_layers
        space.set_tokens(self.ids, self.cache, self.cache.length)
        space.set_exit(layers, self.logits.ctypes.data)
        engine._call(EMBED)
        rows, heads = space.products["rows"].copy(), space.state["kv_heads"]
        if part.endswith(PARTS[2:]):
            space.products["rows"] = 0
        if part == PARTS[3]:
            space.state["kv_heads"] = 0
        start = time.perf_counter()
        if part == "head":
            engine._call(EXIT)
        else:
            engine._call(BLOCKS, 0, layers)
        seconds = time.perf_counter() - start
        space.products["rows"], space.state["kv_heads"] = rows, heads
        return seconds


def medians(batches: list[Batch], repetitions: int, limits: Limits) -> np.ndarray:
    """Medians in ms [batches, parts] of runs in turns; `limits` are sampled once a turn."""
    samples: list[list[list[float]]] = [[[] for _ in PARTS] for _ in batches]
    for turn in range(repetitions + 1):
        limits.sample(batches[0].engine.threads)
        for batch, taken in zip(batches, samples, strict=True):
            for part, values in zip(PARTS, taken, strict=True):
                seconds = batch.seconds(part)
                if turn:  # the first is not counted
                    values.append(1e3 * seconds)
    return np.array([[statistics.median(v) for v in taken] for taken in samples])


def report(tokens: list[int], times: np.ndarray, reading: tuple[float, float]) -> str:
    """A table of parts; `reading`: ms that the bytes of linear layers and head take to be read."""
    blocks, head, without, rest = times.T
    linear, attention, whole = blocks - without, without - rest, blocks + head
    rows = [
        (
            str(count),
            *(f"{x:.2f}" for x in (whole[i], linear[i], attention[i], rest[i], head[i])),
            *(f"{x:.2f}" for x in (whole[i] / whole[0], linear[i] / reading[0])),
            f"{head[i] / reading[1]:.2f}",
        )
        for i, count in enumerate(tokens)
    ]
    header = ("tokens", "ms", "linear", "attention", "rest", "head", "times 1", "linear / bytes",
              "head / bytes")  # fmt: skip
    return table(header, rows)


def main() -> None:
    """Print a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", nargs="?", default="bitskip-v1")
    parser.add_argument("-t", "--threads", default="1,2")
    parser.add_argument("-b", "--batches", default="1,2,4,8")
    parser.add_argument("-d", "--depth", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=9)
    options = parser.parse_args()
    prepare()
    config, weights = preset(options.preset), None
    tokens = [int(b) for b in options.batches.split(",")]
    for threads in (int(t) for t in options.threads.split(",")):
        if weights is None:
            engine = random_model(config, threads=threads)
            weights = engine.weights
        else:
            engine = Engine(config, weights, threads)
        linear = weights.layer_bytes * config.num_hidden_layers
        head = engine.weight_bytes(config.num_hidden_layers) - linear
        limits = Limits(linear + head)
        batches = [Batch(engine, count, options.depth) for count in tokens]
        times = medians(batches, options.repetitions, limits)
        speed = limits.bytes_per_s(threads) or float("nan")
        print(f"\n{options.preset}, {threads} thread(s), {options.depth} positions cached; "
              f"{speed / 1e9:.1f} GB/s read; linear layers {linear / 1e6:.0f} MB, "
              f"head {head / 1e6:.0f} MB\n")  # fmt: skip
        print(report(tokens, times, (1e3 * linear / speed, 1e3 * head / speed)))


if __name__ == "__main__":
    main()
