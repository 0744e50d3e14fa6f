"""How this CPU wants to be asked for weights before their use (`isa.Fetch`): settings in turns.

    python -m benchmarks.fetch MODEL [--isa avx2] [-t 1] [-n 64] [-r 5]

MODEL: a folder, such as `benchmarks.peers` leaves below its --models, or a shipped name. Each run
is a process of its own, whose kernels are compiled for a setting and kept for the next round. It
writes N tokens after the first block alone, where a large head is most of it, and at full depth.
A star marks what this CPU takes now; `isa.FETCHES` holds what was best on those it names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

from bitskip.tables import table
from bitskip_cpu import isa
from bitskip_cpu.isa import FETCHES, Fetch
from bitskip_cpu.models import resolve
from bitskip_ref.folder import read_folder

KIB = 1024
SETTINGS = {
    "both caches, 8 and 1.25 KiB ahead": FETCHES[""],
    "ternary both, 12 and 1.25; of codes one line in eight, 8": FETCHES["znver"],
    **{f"second, {n}": Fetch(ternary=(n * KIB, 0), codes=(n * KIB, 0)) for n in (4, 8, 12, 16, 24)},
    "ternary first, 16 (by words second, 8); codes second, 8; scattered first": FETCHES["znver5"],
    "first, 2 and 1; both halves of a product in turns": FETCHES["znver3"],
    "second, 8 and 8; both halves": Fetch(ternary=(8 * KIB, 0), codes=(8 * KIB, 0), halves=True),
    "second, 8; both halves; of codes one line in eight, 8": Fetch(
        ternary=(8 * KIB, 0), codes=(8 * KIB, 0), sparse=True, halves=True
    ),
    "first, 16; both halves": Fetch(ternary=(0, 16 * KIB), codes=(0, 16 * KIB), halves=True),
    **{f"first, {n}": Fetch(ternary=(0, n * KIB), codes=(0, n * KIB)) for n in (2, 8, 16)},
    "none": Fetch(ternary=(0, 0), codes=(0, 0)),
}


def write(setting: str, model: str, depth: int, threads: int, tokens: int) -> None:
    """Print tokens/s after one block and after all `depth`; in a process without kernels yet."""
    isa.PATH = replace(isa.PATH, fetch=replace(SETTINGS[setting], name="tried"))
    from bitskip_cpu.bench.timing import Task
    from bitskip_cpu.bench.verb import bench

    report, _ = bench(model, None, [Task(0, tokens, 0)], threads=[threads], exits=(1, depth),
                      repetitions=3, seed=0)  # fmt: skip
    print(json.dumps([row["tokens_per_s"]["median"] for row in report.rows]))


def main() -> None:
    """Print a row for each setting: tokens/s in each round."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model")
    options.add_argument("--isa", help="the path, as BITSKIP_ISA")
    options.add_argument("-t", "--threads", type=int, default=1)
    options.add_argument("-n", "--tokens", type=int, default=64)
    options.add_argument("-r", "--rounds", type=int, default=5)
    given = options.parse_args()
    depth = read_folder(resolve(given.model)).config.num_hidden_layers
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "BITSKIP_CACHE_DIR": cache}
        if given.isa:
            environment["BITSKIP_ISA"] = given.isa
        for number in range(given.rounds):
            for setting in SETTINGS:
                run = setting, given.model, depth, given.threads, given.tokens
                code = f"from benchmarks.fetch import write; write(*{run!r})"
                done = subprocess.run([sys.executable, "-c", code], env=environment, check=True,
                                      stdout=subprocess.PIPE, text=True)  # fmt: skip
                found.setdefault(setting, []).append(json.loads(done.stdout))
                print(f"round {number + 1}: {setting}", file=sys.stderr)
    rows = []
    for setting, rounds in found.items():
        here = replace(SETTINGS[setting], name=isa.PATH.fetch.name) == isa.PATH.fetch
        cells = [", ".join(f"{v:.4g}" for v in side) for side in zip(*rounds, strict=True)]
        rows.append([setting + (" *" if here else ""), *cells])
    print(table(["asked for in", "one block", "all blocks"], rows))


if __name__ == "__main__":
    main()
