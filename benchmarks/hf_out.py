"""An exported Hugging Face folder in transformers against the model it came from: top-1 and loss.

    python -m benchmarks.hf_out stories-24 --text FILE

transformers reads the folder in float32. Both say what comes next at every token of the text's
windows of 512: where their likeliest tokens differ, both leads are small, as rounding alone decides
there. The deviation of leads (the likeliest over the second best, both ours) says how far rounding
moves them. The second line of figures rounds what transformers' head reads by SPEC 4.2, as ours is:
its difference from the first is the share that the head has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitskip_cpu
from bitskip_cpu import models
from bitskip_cpu.heldout.text import read_text
from bitskip_cpu.model import Model
from bitskip_ref.arithmetic.quant import quantize_activations
from bitskip_ref.folder import read_folder
from bitskip_ref.heldout import token_losses

CONTEXT = 512
SAME, LOSS = 0.99, 0.002  # the bars: of tokens at least, nats at most


def compared(ours: Model, theirs: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """ids int64 [T + 1] -> values of its T tokens: `same` and `same_rounded` (bool), `lead` and
    `moved` (nats), `loss` and `their_loss` (nats)."""
    inputs, targets = ids[:-1].tolist(), ids[1:]
    z = ours.logits(inputs)
    with torch.no_grad():
        said = theirs(torch.tensor([inputs]), output_hidden_states=True)
        codes, step = quantize_activations(said.hidden_states[-1][0].numpy(), 8)
        read = torch.from_numpy(codes.astype(np.float32) * step)
        rounded = (read @ theirs.lm_head.weight.T).numpy()
    y = said.logits[0].numpy()
    first, second = z.argsort(1)[:, :-3:-1].T
    rows = np.arange(len(z))
    lead, there = (a[rows, first] - a[rows, second] for a in (z, y))
    return {
        "same": y.argmax(1) == z.argmax(1), "same_rounded": rounded.argmax(1) == z.argmax(1),
        "lead": lead, "moved": there - lead,
        "loss": token_losses(z, targets), "their_loss": token_losses(y, targets),
    }  # fmt: skip


def main() -> None:
    """Print what agrees; exit code 1 below 99 % of the tokens, or from 0.002 nats on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--tokens", type=int, help="of the text; default: all")
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from bitskip_export.foreign.hf_write import write_huggingface

    torch.set_num_threads(1)
    path = models.resolve(given.model)
    model = bitskip_cpu.load(path)
    limit = given.tokens and given.tokens + 1
    ids = np.array(read_text(given.text, model, limit).tokens[:limit])
    with tempfile.TemporaryDirectory() as place:
        write_huggingface(read_folder(path), Path(place) / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(Path(place) / "hf", dtype=torch.float32)
    windows = [ids[at : at + CONTEXT + 1] for at in range(0, len(ids) - 1, CONTEXT)]
    found = [compared(model, theirs.eval(), window) for window in windows]
    for count in sorted({min(4, len(found)), len(found)}):
        of = {name: np.concatenate([f[name] for f in found[:count]]) for name in found[0]}
        same, apart = of["same"].mean(), of["their_loss"].mean() - of["loss"].mean()
        print(f"{len(of['same']):,} tokens: the same top-1 in {same:.2%}, loss {apart:+.4f} nats")
        print(f"  with the head's input rounded there, too: {of['same_rounded'].mean():.2%}")
        print(f"  leads moved by {of['moved'].std():.4f} nats; where top-1 differs, ours is at most"
              f" {of['lead'][~of['same']].max(initial=0):.3f} nats")  # fmt: skip
    sys.exit(0 if same >= SAME and abs(apart) < LOSS else 1)


if __name__ == "__main__":
    main()
