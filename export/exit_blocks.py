"""The verb `fit-exits`: blocks of their own for exits of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from bitskip.options import COUNT, FILE, FOLDER, MODEL, THREADS, WHOLE, Listed
from bitskip.terminal import progress_bar
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.engine import Engine
from bitskip_ref.folder import Folder, write_changed
from bitskip_ref.tensors import expected_tensors

if TYPE_CHECKING:
    from bitskip_cpu.model import Model

HELD_BACK = 8192  # tokens, at most, and at most a tenth of the text
KEPT = 1 << 29  # numbers of hidden states that are kept, about, four bytes each


@click.command("fit-exits")
@MODEL
@click.option("--text", type=FILE, required=True, help="What to fit on; a tenth is held back.")
@click.option(
    "--layers", type=Listed(COUNT), required=True, metavar="N,N,...",
    help="The exits that get a block.",
)  # fmt: skip
@click.option("--out", "-o", type=FOLDER, required=True, help="The model folder to write.")
@click.option(
    "--steps", type=COUNT, default=3000, show_default=True, help="Of 512 tokens of the text."
)
@click.option("--context", type=COUNT, help="Tokens in a window. Default: as in training, or 512.")
@click.option(
    "--seed", type=WHOLE, default=0, show_default=True, help="Of first weights and order."
)
@THREADS
@click.option("--force", is_flag=True, help="Write into a folder that holds other files.")
def fit_exits(
    model: str | None, text: Path, layers: list[int], out: Path, steps: int,
    context: int | None, seed: int, threads: int | None, force: bool,
) -> None:  # fmt: skip
    """Give early exits of MODEL, a folder, a feed-forward block each; nothing else of it changes.

    At each of the text's tokens the blocks learn to say what the last layer says, and a little of
    what the text says next. Every verb runs the new model, with early exits and drafts that the old
    one was never trained for.
    """
    import torch

    from bitskip_cpu.cli.loading import load_model
    from bitskip_cpu.heldout.text import read_text as read_tokens
    from bitskip_export.pack import check_target
    from bitskip_train.exit_blocks import TEXT

    check_target(out, force)
    loaded = load_model(model, threads)
    torch.set_num_threads(loaded.threads)
    folder, exits = loaded.folder, sorted(layers)
    with_exits(folder.config, exits)
    context = window(folder, context)
    tokens = read_tokens(text, loaded).tokens
    measured: list[dict[int, float]] = []

    def report(step: int, found: dict[int, float]) -> None:
        measured.append(found)
        parts = [f"step {step}/{steps}", *(f"exit {n} {loss:.4f}" for n, loss in found.items())]
        click.echo(" | ".join(parts), err=True)

    said = f"KL of full depth's prediction and the exit's, plus {TEXT} of the exit's loss"
    click.echo(f"{said}, on text held back, in nats", err=True)
    blocks = fit(loaded, tokens, exits, steps=steps, context=context, seed=seed, report=report)
    write_exit_blocks(folder, out, blocks)
    click.echo(out)
    for n in exits:
        losses = [found[n] for found in measured]
        click.echo(f"exit {n}: {losses[0]:.4f} at first, {min(losses):.4f} fitted")
    if folder.auto_exit is not None:
        click.echo("dropped: the calibrated exit; calibrate again")


def window(folder: Folder, context: int | None) -> int:
    """Tokens of a window of a text: `context`, or as in training. Raises ConfigError for more than
    the model's positions."""
    room = folder.config.max_position_embeddings
    context = context or min(folder.trained_context or 512, room)
    if context > room:
        raise ConfigError(f"--context {context}: must be at most {room}, the model's positions")
    return context


def with_exits(config: ModelConfig, exits: Sequence[int]) -> ModelConfig:
    """The configuration with blocks for these exits, too. Raises ConfigError for one that is not
    before the last."""
    return config.replace(exit_blocks=sorted({*config.exit_blocks, *exits}))


def fit(
    model: Model,
    tokens: np.ndarray,
    exits: Sequence[int],
    *,
    steps: int,
    context: int,
    seed: int = 0,
    report: Callable[[int, dict[int, float]], None] = lambda step, found: None,
) -> dict[str, np.ndarray]:
    """Name under FORMAT 3 -> tensor of new blocks for some exits of a model, as a folder has them.

    tokens: ids int64 [N], of which a tenth, at most HELD_BACK, chooses the step whose blocks are
    taken (`bitskip_train.exit_blocks.fit_exit_blocks`, which has `steps` and `report`, too). The
    model runs once over the rest, in windows of `context` tokens, or over as many of them as KEPT
    has room for; its hidden states are those of its engine, to the bit. Raises ConfigError for
    exits that are not before the last, DataError for a short text.
    """
    from bitskip_export.pack import packed
    from bitskip_train.data import Windows
    from bitskip_train.errors import DataError
    from bitskip_train.exit_blocks import fit_exit_blocks, with_exit_blocks

    config = with_exits(model.config, exits)
    size = min(HELD_BACK, len(tokens) // 10)
    if not size:
        raise DataError(f"{len(tokens)} tokens of text: a tenth is held back, so give 10 or more")
    windows = Windows(tokens[size:], context, seed)
    wanted = *exits, config.num_hidden_layers
    held_back = [tokens[i : min(i + context, size) + 1] for i in range(0, size, context)]
    room = max(1, KEPT // (config.hidden_size * len(wanted) * context))
    texts = list(windows.batch(0, min(room, windows.per_epoch)))
    fitted = fit_exit_blocks(
        with_exit_blocks(config, model.folder.tensors, exits, seed), exits,
        with_targets(model, texts, wanted), with_targets(model, held_back, wanted), steps=steps,
        seed=seed, report=report,
    )  # fmt: skip
    kinds = {name: kind for name, (kind, _) in expected_tensors(config).items()}
    tensors: dict[str, np.ndarray] = {}
    for block in fitted.values():
        for name, values in block.items():
            tensors |= packed(config, name, kinds[name], values)
    return tensors


def with_targets(
    model: Model, texts: Sequence[np.ndarray], exits: Sequence[int]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """`hidden_states` of all tokens of some texts but their last ones, and the token after each."""
    before = hidden_states(model, [ids[:-1] for ids in texts], exits)
    return before, np.concatenate([ids[1:] for ids in texts])


def hidden_states(
    model: Engine | Model, texts: Sequence[np.ndarray], exits: Sequence[int]
) -> dict[int, np.ndarray]:
    """Hidden states f32 [N, D] after n blocks of all tokens of some texts, n in `exits` and L."""
    found: dict[int, list[np.ndarray]] = {n: [] for n in exits}
    stages = {f"layers.{n - 1}.out": n for n in exits}

    def keep(stage: str, values: np.ndarray) -> None:
        if stage in stages:
            found[stages[stage]].append(values.copy())

    with progress_bar("running the model", sum(map(len, texts))) as advance:
        for ids in texts:
            model.extend(ids.tolist(), model.new_cache(), last_only=True, trace=keep)
            advance(len(ids))
    return {n: np.concatenate(parts) for n, parts in found.items()}


def write_exit_blocks(folder: Folder, out: Path, blocks: Mapping[str, np.ndarray]) -> None:
    """Write a model folder's model with new exit blocks; every other tensor keeps its bits.

    blocks: name under FORMAT 3 -> tensor. A calibrated exit is not kept: it was another model's.
    """
    config = with_exits(folder.config, sorted({int(name.split(".")[1]) for name in blocks}))
    trained = folder.trained_exits or (config.num_hidden_layers,)
    exits = sorted({*trained, *config.exit_blocks})
    write_changed(folder, out, config, blocks, exits)
