"""Decoding of several sequences side by side against one, in turns, in one process.

    python -m benchmarks.many --preset bitskip-v1 --sequences 1,2,4,8,16 -t 1 --depth 64 -r 8

Each round measures `--steps` steps of every number of sequences, in changing order; printed are
medians over rounds of tokens/s, and of the ratio to one sequence in the same round, least to most
in brackets. Sequences stand at one depth and go on from there; one sequence runs through
`Engine.step`, several through `Engine.step_many`, as generating does.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from bitskip_cpu.engine import Engine, load, random_model
from bitskip_cpu.models import resolve
from bitskip_ref.config import PRESETS
from bitskip_ref.engine import Row
from bitskip_ref.exits import FixedExit


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
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("-r", "--repetitions", type=int, default=8)
    options = parser.parse_args()
    counts = sorted({1, *map(int, options.sequences.split(","))})
    for threads in map(int, options.threads.split(",")):
        if options.model:
            engine = load(resolve(options.model), threads)
        else:
            engine = random_model(PRESETS[options.preset], 0, threads)
        sides = {n: Side(engine, n, options.depth, options.exit_layer) for n in counts}
        for side in sides.values():
            side.speed(2)
        rounds: list[dict[int, float]] = []
        for i in range(options.repetitions):
            order = counts if i % 2 else counts[::-1]
            rounds.append({n: sides[n].speed(options.steps) for n in order})
        print(f"{threads} thread{'s' * (threads > 1)}, depth {options.depth}")
        print("sequences | tokens/s | times one sequence")
        for n in counts:
            times = [found[n] / found[1] for found in rounds]
            speed = median(found[n] for found in rounds)
            print(f"{n} | {speed:.1f} | {median(times):.2f} ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
