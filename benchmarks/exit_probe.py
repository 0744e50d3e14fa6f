"""How near any exit block can bring an exit of a frozen model: probes far larger than a block.

    python -m benchmarks.exit_probe MODEL --text TRAIN --valid HELD_OUT --exit-layer 12

Each probe is float32, reads the hidden states after that block and ends in the model's own norm and
head, like a block of `fit-exits`, and learns the same from them (`bitskip_train.exit_blocks`: full
depth's prediction, and TEXT of the text's cross-entropy). It has no more to obey: attention, widths
and layers of its own. What the largest of them cannot do, no ternary feed-forward block can.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitskip_cpu
from bitskip_cpu.heldout.text import read_text
from bitskip_cpu.model import Model
from bitskip_experiments.environment import environment
from bitskip_export.exit_blocks import with_targets
from bitskip_ref.files import replace_file
from bitskip_train.exit_blocks import TEXT
from bitskip_train.loaded import parameter_values
from bitskip_train.losses import cross_entropy, distillation

PROBES = {  # name -> layers, attention, inner width of the feed-forward part as a multiple
    "a feed-forward part": (1, False, 1),
    "a feed-forward part, four times as wide": (1, False, 4),
    "a block with attention": (1, True, 1),
    "three blocks with attention": (3, True, 1),
}
WINDOWS = 2  # of a step
RATE, HELD_OUT = 2e-3, 20_000


class Layer(nn.Module):
    """A pre-norm block in float32; attention sees earlier positions of its window."""

    def __init__(self, width: int, heads: int, inner: int, attention: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = self.o = None
        if attention:
            self.qkv, self.o = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
        self.gate, self.up = (nn.Linear(width, inner, False) for _ in range(2))
        self.down = nn.Linear(inner, width, False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        for last in filter(None, (self.o, self.down)):
            nn.init.normal_(last.weight, 0.0, 0.1 / math.sqrt(last.in_features))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        if self.qkv is not None and self.o is not None:
            batch, tokens, width = x.shape
            parts = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1)
            q, k, v = parts.permute(2, 3, 0, 1, 4).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                rotated(q, turn), rotated(k, turn), v, is_causal=True
            )
            x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, width))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, T, E] by turn [T, E / 2], complex."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


class Probe(nn.Module):
    """Layers between hidden states and the model's own norm and head."""

    def __init__(self, model: Model, layers: int, attention: bool, inner: int) -> None:
        super().__init__()
        c, tensors = model.config, model.folder.tensors
        read = lambda name: torch.from_numpy(parameter_values(c, tensors, name))  # noqa: E731
        norm, head = c.exit_names(c.num_hidden_layers)
        self.eps, self.norm, self.head = c.norm_eps, read(f"{norm}.weight"), read(f"{head}.weight")
        self.layers = nn.ModuleList(
            Layer(c.hidden_size, c.num_attention_heads, inner * c.intermediate_size, attention)
            for _ in range(layers)
        )
        pairs = c.hidden_size // c.num_attention_heads // 2
        rates = c.rope_theta ** (-torch.arange(pairs) / pairs)
        angles = torch.arange(c.max_position_embeddings)[:, None] * rates
        self.turn = torch.polar(torch.ones_like(angles), angles)

    def says(self, hidden: Tensor) -> Tensor:
        """The model's norm and head."""
        x = hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.norm
        return x @ self.head.T

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states f32 [B, T, D] -> logits [B, T, V]."""
        for layer in self.layers:
            x = layer(x, self.turn[: x.shape[1]])
        return self.says(x)


@torch.no_grad()
def judged(
    probe: Probe, hidden: Tensor, last: Tensor, targets: Tensor
) -> tuple[float, float, float]:
    """(loss, full depth's loss, share of places where both name the same token) on held-out text.

    Hidden states f32 [windows, T, D], targets int64 [windows, T].
    """
    sums = np.zeros(3)
    for x, y, wanted in zip(hidden, last, targets, strict=True):
        z, whole = probe(x[None])[0], probe.says(y)
        sums += [
            cross_entropy(z, wanted).item(),
            cross_entropy(whole, wanted).item(),
            (z.argmax(-1) == whole.argmax(-1)).sum().item(),
        ]
    loss, full, same = sums / targets.numel()
    return loss, full, same


def fitted(probe: Probe, states: list[Tensor], held_out: list[Tensor], steps: int) -> list[float]:
    """Train a probe; the best of what it reached on held-out text, by loss."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    drawn, best = np.random.default_rng(0), [math.inf]
    hidden, last, targets = states
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * (1 - step / steps)
        some = torch.from_numpy(drawn.integers(len(hidden), size=WINDOWS))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = probe(hidden[some])
            with torch.no_grad():
                whole = probe.says(last[some])
        z, whole = z.float().flatten(0, 1), whole.float().flatten(0, 1)
        named = cross_entropy(z, targets[some].flatten())
        ((distillation(z, whole) + TEXT * named) / len(z)).backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            found = judged(probe, *held_out)
            best = min(best, [found[0], found[2], step + 1])
            print(f"  step {step + 1}: {found[0]:.4f}, same token {found[2]:.3f}", flush=True)
    return best


def states_of(model: Model, text: Path, n: int, tokens: int, context: int) -> list[Tensor]:
    """[hidden states after block n, after the last, next tokens], in windows of `context`."""
    ids = read_text(text, model, limit=tokens).tokens[: tokens + 1]
    texts = [ids[i : i + context + 1] for i in range(0, len(ids) - context, context)]
    depth = model.config.num_hidden_layers
    found, targets = with_targets(model, texts, (n, depth))
    width = model.config.hidden_size
    return [
        *(torch.from_numpy(found[k]).view(-1, context, width) for k in (n, depth)),
        torch.from_numpy(targets.astype(np.int64)).view(-1, context),
    ]


def main() -> None:
    """Print, and write, what each probe reaches."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--exit-layer", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=list(PROBES), help="default: all")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = bitskip_cpu.load(given.model, threads=given.threads)
    context = min(512, model.config.max_position_embeddings)
    n = given.exit_layer
    held_out = states_of(model, given.valid, n, HELD_OUT, context)
    states = states_of(model, given.text, n, given.tokens, context)
    bare, full, same = judged(Probe(model, 0, False, 1), *held_out)
    print(f"full depth {full:.4f}, exit {n} {bare:.4f}, same token {same:.3f}")
    rows = [{"probe": "none", "parameters": 0, "loss": bare, "same_token": same}]
    for name, shape in PROBES.items():
        if given.only not in (None, name):
            continue
        torch.manual_seed(0)
        probe = Probe(model, *shape)
        size = sum(p.numel() for p in probe.parameters())
        began = time.perf_counter()
        loss, same, step = fitted(probe, states, held_out, given.steps)
        rows.append({"probe": name, "parameters": size, "loss": loss, "same_token": same})
        print(
            f"{name}, {size:,} parameters: {loss:.4f} at step {step}, "
            f"{100 * math.expm1(loss - full):+.1f} % of full depth, same token {same:.3f}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if given.out:
            found = {
                "exit": n, "full_depth": full, "steps": given.steps, "tokens": given.tokens,
                "environment": environment(), "probes": rows,
            }  # fmt: skip
            with replace_file(given.out) as file:
                file.write(f"{json.dumps(found, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
