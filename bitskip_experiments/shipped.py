"""Figures for the card of the shipped model: `python -m bitskip_experiments.shipped DATA`.

Writes results/stories-24/{figures.json,table.md}: loss on held-out stories, and on those it was
trained on; what another model has there; and how often texts loop, which a loss does not show.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_experiments.environment import commit, environment
from bitskip_ref.documents import read_documents
from bitskip_ref.files import replace_file

EXITS = (6, 12, 18, 24)
TRAINING_TOKENS = 50_000  # of the training text that are scored
TEXTS, PROMPT_WORDS, TEXT_TOKENS = 120, 8, 150
PENALTIES = (1.0, 1.1)

Figures = dict[str, Any]


def loops(text: str) -> bool:
    """Whether five words in a row occur three times in a text."""
    words = text.split()
    counts = Counter(tuple(words[i : i + 5]) for i in range(len(words) - 4))
    return any(count >= 3 for count in counts.values())


def beginnings(stories: list[str]) -> list[str]:
    """The first words of stories at equal distances."""
    chosen = [stories[i * len(stories) // TEXTS] for i in range(TEXTS)]
    return [" ".join(story.split()[:PROMPT_WORDS]) for story in chosen]


def measure(data: Path) -> Figures:
    """All figures, from DATA/tinystories and DATA/stories260K."""
    import bitskip_cpu

    model = bitskip_cpu.load()
    held_out = data / "tinystories/tinystories_valid.txt"
    training = data / "tinystories/tinystories_train.txt"
    stories = list(read_documents(held_out))
    prompts = beginnings(stories)
    rates: Figures = {}
    for exit_layer in EXITS[1:]:
        for penalty in PENALTIES:
            texts = model.generate_many(
                prompts, max_tokens=TEXT_TOKENS, exit_layer=exit_layer, repetition_penalty=penalty
            )
            rates[f"exit {exit_layer}, greedy, repetition penalty {penalty}"] = sum(
                loops(text.text) for text in texts
            )
    texts = model.generate_many(
        prompts, max_tokens=TEXT_TOKENS, exit_layer=18, temperature=0.7, top_p=0.95
    )
    rates["exit 18, temperature 0.7, top-p 0.95"] = sum(loops(text.text) for text in texts)
    count = TEXT_TOKENS * 3 // 4  # words of so many tokens
    real = [stories[i * len(stories) // TEXTS] for i in range(TEXTS)]
    rates["real stories"] = sum(loops(" ".join(s.split()[:count])) for s in real)
    return {
        "held out": _losses(model, held_out, None),
        "training text": _losses(model, training, TRAINING_TOKENS),
        "stories260K": _stories260k(data, stories),
        "texts": TEXTS, "loops": rates,
        "commit": commit(), "environment": environment(),
    }  # fmt: skip


def _losses(model: Any, path: Path, limit: int | None) -> Figures:
    from bitskip_cpu.heldout.scoring import exit_losses
    from bitskip_cpu.heldout.text import read_text

    text = read_text(path, model, limit)
    context = model.config.max_position_embeddings
    found = exit_losses(model.engine, text, [*EXITS], context=context, stride=context)
    return {str(n): loss.facts() for n, loss in found.items()}


def _stories260k(data: Path, stories: list[str]) -> Figures:
    from bitskip_experiments.subjects import encode_stories260k, load_stories260k
    from bitskip_train.evaluate import evaluate

    config, model, words = load_stories260k(data)
    ids = np.array([i for story in stories for i in encode_stories260k(story, words)])
    size = sum(len(story.encode()) for story in stories)
    depth, context = config.num_hidden_layers, config.max_position_embeddings
    return evaluate(model, ids, size, context=context, exits=(depth,))[depth].facts()


def page(found: Figures) -> str:
    """results/stories-24/table.md."""
    lines = [
        "# The shipped model",
        "",
        "| text | exit | loss, nats a token | perplexity | bits a byte |",
        "|---|---:|---:|---:|---:|",
    ]
    for text, key in (("500 held-out stories", "held out"), ("training text", "training text")):
        for n, facts in found[key].items():
            lines.append(f"| {text} | {n} | {_row(facts)} |")
    lines += [
        f"| held-out stories, stories260K (floats) | | {_row(found['stories260K'])} |",
        "",
        "| texts that loop | of " + str(found["texts"]) + " | |",
        "|---|---:|---:|",
    ]
    for name, count in found["loops"].items():
        share = count / found["texts"]
        error = math.sqrt(share * (1 - share) / found["texts"])
        lines.append(f"| {name} | {count} | {share:.0%} ± {error:.0%} |")
    lines += [
        "",
        f"- Loss with the packed model, context and stride 512, ± over windows; of the training "
        f"text the first {TRAINING_TOKENS:,} tokens.",
        f"- A text loops where five words in a row come three times in its {TEXT_TOKENS} tokens; "
        f"prompts are the first {PROMPT_WORDS} words of held-out stories.",
    ]
    return "\n".join(lines) + "\n"


def _row(facts: Figures) -> str:
    loss = f"{facts['loss']:.4f} ± {facts['loss_se']:.4f}"
    return f"{loss} | {facts['ppl']:.2f} | {facts['bits_per_byte']:.4f}"


def main(data: str) -> None:
    """Measure and write."""
    found = measure(Path(data))
    folder = Path(__file__).parent.parent / "results/stories-24"
    for name, text in (
        ("figures.json", json.dumps(found, indent=1) + "\n"),
        ("table.md", page(found)),
    ):
        with replace_file(folder / name) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
