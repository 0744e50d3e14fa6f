"""Decoding of several sequences side by side against one, in turns, in one process.

    python -m benchmarks.many --preset bitskip-v1 --sequences 1,2,4,8,16 -t 1 --depth 64 -r 8
    python -m benchmarks.many --preset bitskip-v1 --sequences 1,4,8,16 -t 1,2 --depth 16 \\
        --steps 48 -r 3 --llama-batched-bench PATH --kv-cache int8

Each round measures `--steps` steps of every number of sequences, in changing order; printed are
medians over rounds of tokens/s, and of the ratio to one sequence in the same round, least to most
in brackets. Sequences stand at one depth and go on from there; one sequence runs through
`Engine.step`, several through `Engine.step_many`, as generating does.

"at most" is the ratio that no kernel of this instruction set can pass on this machine, from limits
that are measured in the same rounds (`bitskip_cpu.bench.limits`): a step of N sequences takes at
least N times a token's 8-bit multiply-adds over their peak, and at least what reading the weights
once takes; one sequence takes what it was measured to. Attention, norms and quantizers count as
nothing.

With --llama-batched-bench, llama.cpp decodes as many sequences of the same shape (TQ2_0, head Q6_K)
from as deep on in each round; `benchmarks.peers` says how it is built. It needs the package `gguf`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bitskip.tables import table
from bitskip_cpu.bench.costs import linear_weights
from bitskip_cpu.bench.limits import Limits
from bitskip_cpu.engine import Engine, load, random_model
from bitskip_cpu.models import resolve
from bitskip_ref.config import PRESETS, preset
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.exits import FixedExit
from bitskip_ref.rows import Row

Speeds = dict[int, float]  # by number of sequences, tokens/s of all together


class Side:
    """So many sequences behind `depth` positions each."""

    def __init__(self, engine: Engine, sequences: int, depth: int, exit_layer: int | None) -> None:
        self.engine, self.depth, self.rule = engine, depth, FixedExit(exit_layer)
        self.caches = [engine.new_cache() for _ in range(sequences)]
        vocab = engine.config.vocab_size
        for i, cache in enumerate(self.caches):
            ids = [(7 * i + 3 * j) % vocab for j in range(depth)]
            engine.extend(ids, cache, exit_layer=exit_layer, last_only=True)

    def speed(self, steps: int) -> float:
        """Tokens a second, of all sequences together."""
        for cache in self.caches:
            cache.length = self.depth
        rows = [Row(5, cache, self.rule) for cache in self.caches]
        start = time.perf_counter()
        for _ in range(steps):
            if len(rows) == 1:
                self.engine.step(5, self.caches[0], self.rule)
            else:
                self.engine.step_many(rows)
        return steps * len(rows) / (time.perf_counter() - start)


def llama(
    bench: Path, gguf: Path, counts: Sequence[int], depth: int, steps: int, threads: int
) -> Speeds:
    """What llama.cpp does, in one run."""
    words = [str(bench), "-m", str(gguf), "-npp", str(depth), "-ntg", str(steps), "-t",
             str(threads), "-npl", ",".join(map(str, counts)), "-c",
             str(max(counts) * (depth + steps)), "--output-format", "jsonl"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["pl"]: line["speed_tg"] for line in lines}


def bound(engine: Engine, exit_layer: int | None, limits: Limits, one: float, count: int) -> float:
    """Times one sequence, of `one` tokens/s, that `count` sequences can reach at most."""
    config, n = engine.config, exit_layer or engine.config.num_hidden_layers
    products = count * (linear_weights(config, n) + config.vocab_size * config.hidden_size)
    peak = limits.multiply_adds_per_s(engine.threads) or float("inf")
    reading = engine.weight_bytes(n) / (limits.bytes_per_s(engine.threads) or float("inf"))
    return count / one / max(products / peak, reading)


def cell(values: Sequence[float]) -> str:
    """Their median, least to most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(
    rounds: list[Speeds], bounds: list[Speeds], peers: list[Speeds], counts: Sequence[int]
) -> str:
    """A table with a row for each number of sequences."""
    header = ["sequences", "tokens/s", "times one", "at most"]
    header += ["llama.cpp tokens/s", "times one", "bitskip, times"] if peers else []
    rows = []
    for n in counts:
        row = [str(n), f"{median(found[n] for found in rounds):.1f}"]
        row.append(cell([found[n] / found[1] for found in rounds]))
        row.append(f"{median(found[n] for found in bounds):.2f}")
        if peers:
            row.append(f"{median(found[n] for found in peers):.1f}")
            row.append(cell([found[n] / found[1] for found in peers]))
            row.append(cell([a[n] / b[n] for a, b in zip(rounds, peers, strict=True)]))
        rows.append(row)
    return table(header, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a model folder, or stories-24")
    what.add_argument("--preset", choices=PRESETS, help="random weights of that shape")
    parser.add_argument("--sequences", default="1,2,4,8,16")
    parser.add_argument("-t", "--threads", default="1")
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--exit-layer", type=int)
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="float32")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("-r", "--repetitions", type=int, default=8)
    parser.add_argument("--llama-batched-bench", type=Path, help="with --preset, at full depth")
    parser.add_argument("--models", type=Path, default=Path("peer-models"), help="made if missing")
    options = parser.parse_args()
    bench = options.llama_batched_bench
    if bench and (not options.preset or options.exit_layer):
        parser.error("--llama-batched-bench goes with --preset, and without --exit-layer")
    counts = sorted({1, *map(int, options.sequences.split(","))})
    gguf = None
    if bench:
        from benchmarks.runtimes import Models

        options.models.mkdir(exist_ok=True)
        models = Models(options.models, options.preset, preset(options.preset))
        gguf = models.gguf("TQ2_0", "Q6_K")
    for threads in map(int, options.threads.split(",")):
        if options.model:
            engine = load(resolve(options.model), threads, options.kv_cache)
        else:
            made = random_model(PRESETS[options.preset], 0, threads)
            engine = Engine(made.config, made.weights, threads, options.kv_cache)
        depth = engine.config.num_hidden_layers
        limits = Limits(engine.weight_bytes(options.exit_layer or depth))
        sides = {n: Side(engine, n, options.depth, options.exit_layer) for n in counts}
        for side in sides.values():
            side.speed(2)
        rounds, peers = list[Speeds](), list[Speeds]()
        for i in range(options.repetitions):
            order = counts if i % 2 else counts[::-1]
            limits.sample(threads)
            rounds.append({n: sides[n].speed(options.steps) for n in order})
            if gguf:
                peers.append(llama(bench, gguf, counts, options.depth, options.steps, threads))
        bounds = [
            {n: bound(engine, options.exit_layer, limits, found[1], n) for n in counts}
            for found in rounds
        ]
        peak, read = limits.multiply_adds_per_s(threads), limits.bytes_per_s(threads)
        print(f"{threads} thread{'s' * (threads > 1)}, depth {options.depth}, KV cache "
              f"{options.kv_cache}; at most {(peak or 0) / 1e9:.0f} G multiply-adds/s, "
              f"{(read or 0) / 1e9:.1f} GB/s read\n")  # fmt: skip
        print(report(rounds, bounds, peers, counts), "\n")


if __name__ == "__main__":
    main()
