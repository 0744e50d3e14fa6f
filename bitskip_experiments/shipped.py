"""Figures for the card of the shipped model: `python -m bitskip_experiments.shipped DATA`.

Writes results/stories-24/{figures.json,table.md}: loss on held-out stories, and on those it was
trained on; what another model has there; how often texts loop, which a loss does not show; and what
gates and confidence choose. A part that figures.json has is not measured again: delete it first.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_experiments.environment import commit, environment
from bitskip_ref.documents import read_documents
from bitskip_ref.files import replace_file

EXITS = (6, 12, 18, 24)
TRAINING_TOKENS = 50_000  # of the training text that are scored
TEXTS, PROMPT_WORDS, TEXT_TOKENS = 60, 8, 150
PENALTIES = (1.0, 1.15)
RULES = tuple(
    f"gate --thresholds {rule} --exit-layer 6,12,18,24"
    for rule in ("0.5,0.7,0.8,0.9,0.95", "0.4,0.5,0.6,0.7 --exit-looks 6,12 --exit-last 18")
)
"""Against the exits that were trained: those between them are poorer than the ones before them."""
RULE_TOKENS = 10_000
AGAINST = ("loss_against_fixed", "loss_at_equal_multiply_adds")
TIMED = ("tokens_per_s", "pareto", "loss_at_equal_time", "loss_at_equal_time_se")

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


def loop_rates(model: Any, stories: list[str]) -> dict[str, int]:
    """How many of TEXTS texts loop, by how they were drawn; and of as long pieces of real ones."""
    prompts = beginnings(stories)
    drawn = {
        f"exit {n}, greedy, repetition penalty {penalty}": {
            "exit_layer": n, "temperature": 0.0, "repetition_penalty": penalty,
        }
        for n in EXITS[1:] for penalty in PENALTIES
    }  # fmt: skip
    drawn["exit 18, temperature 0.7, top-p 0.95"] = {
        "exit_layer": 18, "temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.0,
    }  # fmt: skip
    drawn["as the folder recommends"] = {}
    rates = {}
    for name, how in drawn.items():
        texts = model.generate_many(prompts, max_tokens=TEXT_TOKENS, **how)
        rates[name] = sum(loops(text.text) for text in texts)
    count = TEXT_TOKENS * 3 // 4  # words of so many tokens
    real = [stories[i * len(stories) // TEXTS] for i in range(TEXTS)]
    return {**rates, "real stories": sum(loops(" ".join(s.split()[:count])) for s in real)}


def measure_rule(text: Path, words: str) -> list[Figures]:
    """What `bitskip exits` says of one of RULES but for times, which are a busy machine's."""
    command = [sys.executable, "-m", "bitskip", "exits", "--text", str(text), "--json"]
    command += ["--tokens", str(RULE_TOKENS), "--rule", *words.split()]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    rules = [at for at in said["exits"] if at["threshold"] is not None]
    return [{k: v for k, v in at.items() if k not in TIMED} for at in rules]


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
        "| rule, looks | mean depth | loss | less the fixed exit's of that depth | "
        "at equal multiply-adds |",
        "|---|---:|---:|---:|---:|",
    ]
    for words in RULES:
        for at in found[words]:
            looks = at["looks"]
            where = "every block" if len(looks) > 3 else ", ".join(map(str, looks))
            compared = (f"{at[k]:+.4f} ± {at[f'{k}_se']:.4f}" for k in AGAINST)
            lines.append(
                f"| {at['exit_layer']} > {at['threshold']:.4g} at {where}, else {at['last']} | "
                f"{at['mean_exit_layer']:.2f} | {at['loss']:.4f} | {' | '.join(compared)} |"
            )
    lines += [
        "",
        f"- Loss with the packed model, context and stride 512, ± over windows; of the training "
        f"text the first {TRAINING_TOKENS:,} tokens.",
        f"- A text loops where five words in a row come three times in its {TEXT_TOKENS} tokens; "
        f"prompts are the first {PROMPT_WORDS} words of held-out stories.",
        f"- Rules token by token on the first {RULE_TOKENS:,} held-out tokens, against mixtures of "
        "the two fixed exits around (of the same mean depth; of as much work, with looks and the "
        "keys and values of skipped blocks), ± the paired standard error over windows.",
    ]
    return "\n".join(lines) + "\n"


def _row(facts: Figures) -> str:
    loss = f"{facts['loss']:.4f} ± {facts['loss_se']:.4f}"
    return f"{loss} | {facts['ppl']:.2f} | {facts['bits_per_byte']:.4f}"


def main(data: str) -> None:
    """Measure what is missing, and write."""
    import bitskip_cpu

    model, tinystories = bitskip_cpu.load(), Path(data) / "tinystories"
    held_out = tinystories / "tinystories_valid.txt"
    training = tinystories / "tinystories_train.txt"
    stories = list(read_documents(held_out))
    folder = Path(__file__).parent.parent / "results/stories-24"
    figures = folder / "figures.json"
    found = json.loads(figures.read_text("utf-8")) if figures.exists() else {}
    parts: dict[str, Callable[[], Any]] = {
        "held out": lambda: _losses(model, held_out, None),
        "training text": lambda: _losses(model, training, TRAINING_TOKENS),
        "stories260K": lambda: _stories260k(Path(data), stories),
        "texts": lambda: TEXTS,
        "loops": lambda: loop_rates(model, stories),
        **{words: partial(measure_rule, held_out, words) for words in RULES},
    }
    for name, measure in parts.items():
        if name not in found:
            found |= {name: measure(), "commit": commit(), "environment": environment()}
            _write(figures, json.dumps(found, indent=1) + "\n")
    _write(folder / "table.md", page(found))


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
