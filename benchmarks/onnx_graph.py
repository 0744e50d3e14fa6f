"""Our exported graph on ONNX Runtime, timed as `bitskip-cpu bench` times the kernels.

    python -m benchmarks.onnx_graph FOLDER [-t THREADS] [-p PROMPT] [-n STEPS]

prints {"ppP": tokens/s, "tgN": tokens/s} as JSON.
"""

from __future__ import annotations

import argparse
import json

from bitskip_cpu.bench.timing import measure, plan, tasks_of
from bitskip_export.onnx_engine import load_onnx


def main() -> None:
    """Print the two speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--steps", type=int, default=64)
    options = parser.parse_args()
    model = load_onnx(options.folder, threads=options.threads)
    tasks = tasks_of([options.prompt], [options.steps], [], [0])
    cases = plan([model], tasks, [model.config.num_hidden_layers])
    measure(cases, 1)
    print(json.dumps({case.task.name: case.tokens_per_s()[0] for case in cases}))


if __name__ == "__main__":
    main()
