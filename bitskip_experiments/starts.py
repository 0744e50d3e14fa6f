"""Gradients at the first step, of the 2x2 as ours and as in the authors' public code.

`python -m bitskip_experiments.starts DATA WORK` writes results/first-gradients. No run is needed:
models as they start, the first batch of training text, products in float32.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from bitskip_experiments.definitions import Point, load
from bitskip_experiments.runs import runs_of
from bitskip_experiments.tables import number
from bitskip_ref.files import replace_file

LAYERS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
SEEDS = (0, 1, 2)
Found = dict[str, dict[str, list[float]]]
"""run -> layer -> mean |gradient| over all blocks' weights, for each seed."""


def first_gradients(point: Point, seed: int, tokens: Path | None, work: Path) -> dict[str, float]:
    """Layer -> mean |gradient| of the whole loss before the first step."""
    import torch

    from bitskip_train.data import TextSource, Windows, load_split
    from bitskip_train.draws import Draws
    from bitskip_train.model import BitskipModel
    from bitskip_train.objective import Objective
    from bitskip_train.readings import public_init
    from bitskip_train.tokenizer import parse_tokenizer

    run = runs_of([point], (seed,), tokens, work)[0]
    train = point.train.replace(seed=seed, dtype="float32")
    place = run.corpus.tokenizer(train.tokenizer, work)
    tokenizer = parse_tokenizer(Path(place).read_text("utf-8"), place)
    split = load_split(
        TextSource((run.corpus.place("train"),), "train"), tokenizer, work / "tokens"
    )
    torch.manual_seed(seed)
    model = BitskipModel(point.model)
    if train.init == "public":
        public_init(model, point.model.hadamard)
    model.reading = train
    ids = torch.from_numpy(Windows(split.tokens, train.context, seed).batch(0, train.batch))
    Objective(model, train, torch.device("cpu")).backward(ids, 0, Draws(seed, 0, train.batch))
    sums: dict[str, list[float]] = {}
    for name, weight in model.quantized_weights():
        layer = name.split(".")[-2]
        if layer in LAYERS and weight.grad is not None:
            sums.setdefault(layer, []).append(float(weight.grad.abs().mean()))
    return {layer: statistics.fmean(values) for layer, values in sums.items()}


def page(found: Found) -> str:
    """results/first-gradients/table.md."""
    lines = [
        "# Gradients at the first step",
        "",
        "| Configuration | " + " | ".join(layer.removesuffix("_proj") for layer in LAYERS) + " |",
        "|---|" + "---:|" * len(LAYERS),
    ]
    for name, layers in found.items():
        cells = [number(statistics.fmean(layers[layer]), ".1e") for layer in LAYERS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "- Mean |gradient| of a weight over all blocks, mean over seeds 0, 1, 2; the first batch, "
        "before clipping. AdamW's epsilon is 1e-8: below it a weight hardly moves.",
    ]
    return "\n".join(lines) + "\n"


def main(data: str, work: str) -> None:
    """Measure and write."""
    found: Found = {}
    for name, word in (("v2-length", "ours"), ("public-code", "public code")):
        for point in load(name, "cpu").points:
            seeds = [first_gradients(point, s, Path(data), Path(work)) for s in SEEDS]
            found[f"{point.label} ({word})"] = {n: [x[n] for x in seeds] for n in LAYERS}
    folder = Path(__file__).parent.parent / "results/first-gradients"
    with replace_file(folder / "gradients.json") as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    with replace_file(folder / "table.md") as file:
        file.write(page(found).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
