"""An exported GGUF file in stock llama.cpp against the model it came from: texts and perplexity.

    python -m benchmarks.gguf_out stories-24 --llama BIN --text FILE

BIN: a folder with llama-completion and llama-perplexity. The prompts are the first four, eight and
sixteen words of documents. Where texts part, the lead of our token over the second best is
printed: rounding alone decides where it is small. The perplexity is llama-perplexity's: of chunks
of 512 tokens the second halves count.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import bitskip_cpu
from bitskip_cpu import models
from bitskip_cpu.model import Model
from bitskip_ref.documents import END_OF_TEXT
from bitskip_ref.folder import read_folder
from bitskip_ref.heldout import token_losses

TOKENS, CHUNK, WORDS = 20, 512, (4, 8, 16)
MORE = 4  # tokens that llama-completion is asked for beyond: the last are not always printed


def run(tool: Path, *arguments: object) -> str:
    """What a llama.cpp tool prints."""
    done = subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={"LD_LIBRARY_PATH": str(tool.parent)},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{tool.name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def texts(
    model: Model, exit_layer: int | None, prompts: list[str], gguf: Path, tools: Path
) -> list[bool]:
    """For each prompt, whether the first tokens of both greedy texts are the same."""
    same = []
    for prompt in prompts:
        ours = model.generate(
            prompt, max_tokens=TOKENS, exit_layer=exit_layer, temperature=0, repetition_penalty=1.0
        )
        theirs = run(
            tools / "llama-completion", "-m", gguf, "-p", prompt, "-n", TOKENS + MORE, "--temp", 0,
            "-no-cnv", "--no-warmup", "--no-display-prompt", "-t", 1,
        )  # fmt: skip
        same.append(ours.text.strip() in theirs)
        if same[-1]:
            continue
        ids, decode = ours.token_ids, model.tokenizer.decode
        # The token after it differs, or this one: "the" is the beginning of their "their", too.
        shared = max(n for n in range(len(ids) + 1) if decode(ids[:n]).lstrip() in theirs)
        z = np.sort(model.logits([*model.prompt_ids(prompt), *ids[:shared]], exit_layer)[-2:])
        lead = (z[:, -1] - z[:, -2]).min()
        print(f"{prompt!r}: other from about token {shared + 1} on, our lead there {lead:.3f}")
    return same


def perplexity(model: Model, exit_layer: int | None, ids: list[int]) -> float:
    """Ours, over llama-perplexity's chunks."""
    losses = [
        token_losses(
            model.logits(chunk, exit_layer)[CHUNK // 2 : -1], np.array(chunk[CHUNK // 2 + 1 :])
        )
        for at in range(0, len(ids) - CHUNK + 1, CHUNK)
        for chunk in [ids[at : at + CHUNK]]
    ]
    return math.exp(float(np.concatenate(losses).mean()))


def main() -> None:
    """Print what agrees; exit code 1 below 8 of 10 texts, or above 1 % of perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's tools")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--exit-layer", type=int, help="default: all blocks")
    parser.add_argument("--characters", type=int, default=60_000, help="for the perplexity")
    parser.add_argument("--prompts", type=int, default=200, help="of each length")
    given = parser.parse_args()
    from bitskip_export.foreign.gguf_write import write_gguf

    path, depth = models.resolve(given.model), given.exit_layer
    model = bitskip_cpu.load(path)
    with tempfile.TemporaryDirectory() as place:
        gguf, text = Path(place) / "model.gguf", Path(place) / "text"
        write_gguf(read_folder(path), gguf, exit_layer=depth)
        whole = given.text.read_text("utf-8")
        said = whole[: given.characters]
        text.write_text(said, "utf-8")
        stories, same = [document.split() for document in whole.split(END_OF_TEXT)], []
        for count in WORDS:
            starts = dict.fromkeys(" ".join(s[:count]) for s in stories if len(s) >= count)
            found = texts(model, depth, list(starts)[: given.prompts], gguf, given.llama)
            print(f"prompts of {count} words: {sum(found)} of {len(found)} texts agree")
            same += found
        out = run(given.llama / "llama-perplexity", "-m", gguf, "-f", text, "-c", CHUNK, "-t", 1)
        theirs = float(re.findall(r"PPL = ([0-9.]+)", out)[-1])
        ours = perplexity(model, depth, model.tokenizer.encode(said))
    print(f"texts: {sum(same)} of {len(same)} agree in their first {TOKENS} tokens")
    print(f"perplexity: {ours:.4f} here, {theirs:.4f} there, {100 * (theirs / ours - 1):+.2f} %")
    sys.exit(0 if sum(same) >= 0.8 * len(same) and abs(theirs / ours - 1) <= 0.01 else 1)


if __name__ == "__main__":
    main()
