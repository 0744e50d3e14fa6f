"""What a head of 8, 6 or 4 bits costs a token, and what an early exit gains with it; side by side.

    python -m benchmarks.heads [--preset bitskip-v1] [-t 2] [-r 7]

Random weights. Per round every head format decodes 32 tokens at full depth and at 3/4 of it; the
medians over rounds are printed. What the formats do to perplexity: `cli.py export --head int4`,
then `bitskip-cpu perplexity`.
"""

from __future__ import annotations

import argparse
import statistics
import time

from bitskip_cpu.engine import Engine, random_model
from bitskip_ref.config import preset
from bitskip_ref.exits import FixedExit

FORMATS = ("int8", "int6", "int4")
TOKENS = 32


def speed(engine: Engine, depth: int) -> float:
    """Tokens/s of single steps from an empty cache."""
    cache, rule = engine.new_cache(), FixedExit(depth)
    start = time.perf_counter()
    for token in range(TOKENS):
        engine.step(token, cache, rule)
    return TOKENS / (time.perf_counter() - start)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--preset", default="bitskip-v1")
    options.add_argument("-t", "--threads", type=int, default=2)
    options.add_argument("-r", "--rounds", type=int, default=7)
    given = options.parse_args()
    config = preset(given.preset)
    full = config.num_hidden_layers
    depths = full, full * 3 // 4
    engines = {
        name: random_model(config.replace(head_format=name), 0, given.threads) for name in FORMATS
    }
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(given.rounds + 1):  # the first warms up
        for name, engine in engines.items():
            for depth in depths:
                samples = found.setdefault((name, depth), [])
                value = speed(engine, depth)
                if number:
                    samples.append(value)
    print(f"{given.preset}, {given.threads} threads, median of {given.rounds}\n")
    print(f"| head | bytes a token | tokens/s at {full} | at {depths[1]} | gain |")
    print("|---|---:|---:|---:|---:|")
    for name, engine in engines.items():
        whole, early = (statistics.median(found[name, depth]) for depth in depths)
        size = engine.weight_bytes(full) / 1e6
        gain = 100 * (early / whole - 1)
        print(f"| {name} | {size:.0f} MB | {whole:.1f} | {early:.1f} | +{gain:.1f} % |")


if __name__ == "__main__":
    main()
