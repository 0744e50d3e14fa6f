"""What `benchmarks.peers` runs: commands that print speeds, and how to read what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.linear_layers import KINDS
from benchmarks.random_gguf import nearest, write
from bitskip_cpu.bench.costs import entropy_bytes
from bitskip_cpu.weights import random_tensors
from bitskip_ref.config import ModelConfig
from bitskip_ref.folder import write_folder

LONGEST = 600  # seconds of one command
IK = "IQ2_BN"  # of ik_llama.cpp: its fastest format of two bits


@dataclass(frozen=True)
class Runtime:
    """A runtime with a model.

    `command` makes the command line for a number of threads; `read` takes its standard output to
    rows with `test`, `exit_layer` and `tokens_per_s`, and to the limits measured in it (or None).
    """

    name: str
    command: Callable[[int], list[str]]
    read: Callable[[str], tuple[list[dict[str, Any]], dict[str, float] | None]]
    entropy_bytes: float | None = None  # of the linear weights of one token; None: not a model
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, threads: int) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
        """One turn. Raises RuntimeError with the command's last words if it fails."""
        try:
            done = subprocess.run(
                self.command(threads), capture_output=True, text=True, timeout=LONGEST,
                env={**os.environ, **self.environment},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{self.name}: no end after {LONGEST} s") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{self.name}: exit code {done.returncode}: {last}")
        return self.read(done.stdout)


def bitskip(
    folder: Path, config: ModelConfig, tests: Sequence[str], isa: str | None = None,
    exits: Sequence[int] = (), head: str = "",
) -> Runtime:  # fmt: skip
    """`bitskip-cpu bench` on a model folder, by default at full depth."""
    words = [sys.executable, "-m", "bitskip_cpu", "bench", str(folder), "-r", "1", "-o", "json"]
    words += ["--exit-layer", ",".join(map(str, exits))] if exits else []

    def read(text: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
        report = json.loads(text)
        rows = [
            {**{key: row[key] for key in ("test", "exit_layer")},
             "tokens_per_s": row["tokens_per_s"]["median"], "read_share": row.get("read_share")}
            for row in report["rows"]
        ]  # fmt: skip
        limits = {
            key: value["median"]
            for key, value in report["limits"][0].items()
            if isinstance(value, dict)
        }
        return rows, limits

    return Runtime(
        " ".join(filter(None, ("bitskip", isa, head and f"head {head}"))),
        lambda threads: [*words, *tests, "-t", str(threads)],
        read,
        entropy_bytes(config, config.num_hidden_layers),
        {"BITSKIP_ISA": isa} if isa else {},
    )


def llama_cpp(
    bench: Path, gguf: Path, name: str, config: ModelConfig | None, tests: Sequence[str]
) -> Runtime:
    """`llama-bench` on a GGUF file: of the shape `random_gguf.nearest(config)`, or any (None)."""
    words = [str(bench), "-m", str(gguf), "-r", "1", "-o", "json", *tests]

    def read(text: str) -> tuple[list[dict[str, Any]], None]:
        rows = []
        for row in json.loads(text):
            kinds = (("pp", "n_prompt"), ("tg", "n_gen"))
            test = "+".join(f"{kind}{row[key]}" for kind, key in kinds if row[key])
            rows.append({"test": test, "exit_layer": None, "tokens_per_s": row["avg_ts"]})
        return rows, None

    size = None
    if config is not None:
        shape = nearest(config)
        size = entropy_bytes(shape.replace(linear="ternary"), shape.num_hidden_layers)
    return Runtime(name, lambda threads: [*words, "-t", str(threads)], read, size)


def script(name: str, module: str, arguments: Sequence[str], size: float | None = None) -> Runtime:
    """A script beside this one that prints {test: tokens/s}."""

    def read(text: str) -> tuple[list[dict[str, Any]], None]:
        found = json.loads(text).items()
        return [{"test": t, "exit_layer": None, "tokens_per_s": speed} for t, speed in found], None

    words = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return Runtime(name, lambda threads: [*words, "-t", str(threads)], read, size)


@dataclass(frozen=True)
class Models:
    """Model files of one preset, made when first asked for and kept in a folder."""

    root: Path
    preset: str
    config: ModelConfig

    def folder(self, head: str = "") -> Path:
        """A model folder of ours with random weights; `head` is a head format, if not its own."""
        path = self.root / "-".join(filter(None, (self.preset, head)))
        if not (path / "config.json").exists():
            config = self.config.replace(head_format=head) if head else self.config
            write_folder(path, config, random_tensors(config, 0))
        return path

    def gguf(self, linear: str, head: str) -> Path:
        """A GGUF file."""
        path = self.root / f"{self.preset}-{linear}-{head}.gguf"
        if not path.exists():
            part = path.with_suffix(".part")
            write(self.config, linear, head, part)
            part.replace(path)
        return path

    def requantized(self, quantize: Path) -> Path:
        """A GGUF file in the format IQ2_BN, head Q6_K, by ik_llama.cpp's `llama-quantize`.

        Raises RuntimeError with its last words if that fails.
        """
        path = self.root / f"{self.preset}-{IK}.gguf"
        if not path.exists():
            part, kind = path.with_suffix(".part"), "q6_K"
            words = ["--output-tensor-type", kind, "--token-embedding-type", kind]
            words += [str(self.gguf("F16", "F16")), str(part), IK]
            done = subprocess.run([str(quantize), *words], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"{quantize}: exit code {done.returncode}: {last}")
            part.replace(path)
        return path


def runtimes(
    models: Models, names: Sequence[str], *, llama_bench: Path | None, ik_bench: Path | None,
    prompt: int, steps: int, isa: str | None,
) -> list[Runtime]:  # fmt: skip
    """Runtimes by name: bitskip or bitskip/HEAD; FORMAT/HEAD of llama.cpp, as TQ2_0/Q6_K; IQ2_BN,
    ik_llama.cpp's; onnx; linear_layers'.

    Raises ValueError for an unknown name, or a GGUF format without its llama-bench.
    """
    tests = ["-p", str(prompt), "-n", str(steps)]
    config, found = models.config, []
    whole = entropy_bytes(config, config.num_hidden_layers)
    for name in names:
        linear, _, head = name.partition("/")
        if linear == "bitskip":
            found.append(bitskip(models.folder(head), config, tests, isa, head=head))
        elif name == "onnx":
            label, folder = "onnxruntime, our graph", str(models.folder())
            found.append(script(label, "onnx_graph", [folder, *tests], whole))
        elif name in KINDS:
            label = f"linear layers alone: {KINDS[name]}"
            found.append(script(label, "linear_layers", [name, models.preset, *tests]))
        elif name == IK:
            if ik_bench is None:
                raise ValueError(f"{name}: needs --ik-bench PATH")
            gguf = models.requantized(ik_bench.with_name("llama-quantize"))
            asked = [*tests, "-rtr", "1", "-fa", "1"]
            found.append(llama_cpp(ik_bench, gguf, f"ik_llama.cpp {name}", config, asked))
        elif head:
            if llama_bench is None:
                raise ValueError(f"{name}: needs --llama-bench PATH")
            gguf = models.gguf(linear, head)
            label = f"llama.cpp {linear}, head {head}"
            found.append(llama_cpp(llama_bench, gguf, label, config, tests))
        else:
            known = ", ".join(["bitskip", "bitskip/HEAD", "FORMAT/HEAD", IK, "onnx", *KINDS])
            raise ValueError(f"unknown runtime {name!r}: one of {known}")
    return found
