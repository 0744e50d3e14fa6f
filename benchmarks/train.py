"""Time of a training step: ternary against float32 weights, and against a Llama of transformers.

    python -m benchmarks.train [--shape wide] [--dtype bfloat16] [--compile] [--terms] [-r 7]

Every model of a shape does a few steps in turn, round by round; medians over the rounds are
printed, and the median over the rounds of the ratios. A step is everything between two batches:
forward, backward, clipping, AdamW. `twin` is the same model with float32 weights and activations
and without Hadamard transform. The Llama, of v1's shape, is driven the plain way: autocast,
its own loss, the same clipping and optimizer. On one thread the process's own CPU time is counted,
which other processes disturb less than the clock on the wall. Early-exit loss, layer dropout, gates
and quantization loss are off unless `--terms` is given; the Llama has none of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitskip.tables import table
from bitskip_cpu.machine import fingerprint
from bitskip_ref.config import PRESETS, ModelConfig
from bitskip_train.data import Split, Windows
from bitskip_train.draws import Draws
from bitskip_train.memory import keep_freed_memory
from bitskip_train.settings import TrainConfig
from bitskip_train.trainer import Trainer, make_optimizer

Step = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and of a batch."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 4096
    batch: int = 2
    context: int = 512

    def model(self, preset: str) -> ModelConfig:
        """The features of a preset on these sizes."""
        sizes = {k: v for k, v in asdict(self).items() if k not in ("batch", "context")}
        return PRESETS[preset].replace(**sizes, max_position_embeddings=self.context)

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.context


SHAPES = {
    "stories": Shape(192, 24, 3, 1, 64, 384),  # stories-24
    "wide": Shape(1024, 4, 16, 4, 64, 2048),  # bound by its products
    "narrow": Shape(64, 24, 4, 1, 16, 128, 2048, batch=8, context=256),  # bound by small operations
}
MODELS = {
    "v1": "bitskip-v1", "v3 (Hadamard)": "bitskip-v3", "wt2-baseline": "wt2-baseline",
    "wt2-bitskip (Hadamard)": "wt2-bitskip",
}  # fmt: skip
LLAMA = "transformers Llama"
TERMS: dict[str, Any] = {
    "exit_lambda": 0.3, "exit_subset": 2, "dropout_max": 0.5, "quant_lambda": 0.05,
}  # fmt: skip


def twin(config: ModelConfig) -> ModelConfig:
    """The same model in full precision."""
    return config.replace(linear="float32", hadamard=False)


def trainer(config: ModelConfig, shape: Shape, given: argparse.Namespace) -> Trainer:
    """Ours, on random tokens."""
    terms = dict(TERMS) if given.terms else {}
    if config.linear != "ternary":
        terms.pop("quant_lambda", None)
    if config.gates and given.terms:
        terms["route_lambda"] = 0.2
    settings = TrainConfig(
        context=shape.context, batch=shape.batch, steps=1 << 20, warmup=10, dtype=given.dtype,
        threads=given.threads, compile=given.compile, device="cpu", **terms,
    )  # fmt: skip
    return Trainer(config, settings, random_text(shape), None, "{}", Path("unused"))


def random_text(shape: Shape) -> Split:
    """64 batches."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, 64 * shape.tokens).astype(np.uint16)
    return Split(tokens, len(tokens))


def llama(shape: Shape, given: argparse.Namespace) -> Step:
    """A step of transformers' Llama of v1's shape, on random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = TrainConfig()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads, head_dim=shape.head_dim,
        num_key_value_heads=shape.num_key_value_heads, max_position_embeddings=shape.context,
        use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if given.compile:
        for layer in model.model.layers:
            layer.compile()
    optimizer = make_optimizer(model, settings)
    tokens = torch.from_numpy(random_text(shape).tokens.astype(np.int64))
    batches = iter(int(n) for n in np.random.default_rng(1).integers(0, 63, 1 << 20))

    def step() -> None:
        ids = tokens[next(batches) * shape.tokens :][: shape.tokens].view(shape.batch, -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=given.dtype == "bfloat16"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def runners(shape: Shape, given: argparse.Namespace) -> dict[str, Step]:
    """Name -> step, the twin of `NAME` being `NAME twin`."""
    found: dict[str, Step] = {}
    for name, preset in MODELS.items():
        if not any(wanted in name for wanted in given.models.split(",")):
            continue
        config = shape.model(preset)
        found[name] = trainer(config, shape, given).train_step
        found[f"{name} twin"] = trainer(twin(config), shape, given).train_step
    if not given.no_llama:
        found[LLAMA] = llama(shape, given)
    return found


def measure(
    steps: dict[str, Step], rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a step of each by the clock, round by round; a turn takes about so many seconds."""
    counts: dict[str, int] = {}
    for name, step in steps.items():
        step()  # compiles
        begin = clock()
        step()
        counts[name] = max(1, round(seconds / (clock() - begin)))
        print(f"  {name}: {counts[name]} steps a turn", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = clock()
            for _ in range(counts[name]):
                step()
            found[name].append((clock() - begin) / counts[name])
    return found


def loading(shape: Shape, steps: int = 50) -> float:
    """Seconds in which a step's tokens and random numbers are ready, from mapped ids."""
    with tempfile.NamedTemporaryFile() as file:
        text = random_text(shape)
        file.write(text.tokens.tobytes())
        file.flush()
        windows = Windows(np.memmap(file.name, text.tokens.dtype, mode="r"), shape.context, 0)
        begin = time.perf_counter()
        for step in range(steps):
            windows.batch(step * shape.batch, shape.batch)
            Draws(0, step * shape.batch, shape.batch).uniform(shape.num_hidden_layers)
        return (time.perf_counter() - begin) / steps


def ratio(found: dict[str, list[float]], name: str, other: str) -> str:
    """Median over the rounds of this one's time over the other's, with least and most."""
    if other not in found or name == other:
        return ""
    each = sorted(a / b for a, b in zip(found[name], found[other], strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def show(found: dict[str, list[float]], tokens: int) -> str:
    """The table of one shape."""
    rows = []
    for name, times in found.items():
        middle = statistics.median(times)
        rows.append(
            (name, f"{1e3 * middle:.1f}", f"{tokens / middle:,.0f}",
             ratio(found, name, f"{name} twin"), ratio(found, name, LLAMA))
        )  # fmt: skip
    return table(("model", "ms a step", "tokens/s", "time / twin", "time / Llama"), rows)


def main() -> None:
    """Print a table for each shape; `-o` also writes all samples."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--shape", default="stories,wide", help=f"of {', '.join(SHAPES)}")
    options.add_argument("--models", default="v1,v3,wt2", help="parts of their names")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    options.add_argument("--terms", action="store_true", help="exits, dropout, gates, ...: on")
    options.add_argument("--no-llama", action="store_true")
    options.add_argument("-t", "--threads", type=int, default=1)
    options.add_argument("-r", "--rounds", type=int, default=7)
    options.add_argument("--turn", type=float, default=0.5, help="seconds of a model's turn")
    options.add_argument("-o", "--out", type=Path, help="JSON file for the samples")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as `train` does; for the Llama too
    facts: dict[str, Any] = {
        "machine": fingerprint(), "torch": torch.__version__,
        "options": {k: v for k, v in vars(given).items() if k != "out"}, "shapes": {},
    }  # fmt: skip
    clock = time.process_time if given.threads == 1 else time.perf_counter
    for name in given.shape.split(","):
        shape = SHAPES[name]
        found = measure(runners(shape, given), given.rounds, given.turn, clock)
        facts["shapes"][name] = {**asdict(shape), "seconds": found}
        how = f"{given.dtype}{', compiled' if given.compile else ''}"
        print(
            f"\n{name}: {shape.num_hidden_layers} layers of {shape.hidden_size}, {shape.batch} x "
            f"{shape.context} tokens, {how}, {given.threads} thread(s), {given.rounds} rounds\n"
        )
        print(show(found, shape.tokens), flush=True)
        least = min(statistics.median(times) for times in found.values())
        data = loading(shape)
        print(f"\ndata and draws: {1e3 * data:.2f} ms a step, {data / least:.2%} of the fastest")
    if given.out:
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
