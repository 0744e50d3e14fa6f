"""The verbs `train`, `evaluate`, `average` and `fit-gates`. PyTorch is imported when one runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.shell_completion import CompletionItem

from bitskip.options import (
    COUNT,
    FILE,
    FOLDER,
    JSON,
    NEW_FILE,
    TOKEN_CACHE,
    WHOLE,
    Finite,
    Listed,
    Word,
    exit_layer,
)
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.documents import END_OF_TEXT, read_text
from bitskip_ref.folder import Folder, read_folder
from bitskip_train.errors import CheckpointError
from bitskip_train.recipes import (
    RECIPES,
    Tables,
    apply,
    known_settings,
    parse_overrides,
    read_toml,
    recipe,
    whole,
)
from bitskip_train.settings import TrainConfig, check_settings

if TYPE_CHECKING:
    from torch import Tensor

    from bitskip_text.tokenizer import Tokenizer
    from bitskip_train.checkpoint import Checkpoint
    from bitskip_train.trainer import Trainer


class _Setting(click.ParamType):
    """KEY=VALUE; `parse_overrides` reads it."""

    name = "KEY=VALUE"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """The settings that begin so."""
        found: Iterable[str] = (n for n in known_settings() if n.startswith(incomplete))
        return [CompletionItem(f"{name}=") for name in found]


_device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where to compute; auto: on a GPU if there is one.",
)  # fmt: skip
_checkpoint = click.argument("checkpoint", type=FILE)
_out_option = click.option("--out", "-o", required=True, type=NEW_FILE, help="Checkpoint to write.")


@click.command()
@click.option("--preset", type=Word("preset", lambda: RECIPES), help="Model and training settings.")
@click.option(
    "--config", "config_file", type=FILE,
    help="TOML file with [model] and [train]: all settings, or changes to the preset.",
)  # fmt: skip
@click.option(
    "--from", "source", type=FOLDER,
    help="In place of a preset: a model folder, whose weights the run begins with. Its tokenizer, "
    "too, unless --set names another: then tokens that both know keep their rows.",
)  # fmt: skip
@click.option(
    "--set", "overrides", multiple=True, type=_Setting(), metavar="KEY=VALUE",
    help="One setting, for example model.hidden_size=192 or lr=3e-4. Repeatable; last word.",
)  # fmt: skip
@click.option("--data", multiple=True, help="Text file, folder of .txt, tinystories or wikitext-2.")
@click.option("--valid", multiple=True, help="Held-out text, the same way.")
@click.option("--out", "-o", type=FOLDER, help="Folder to write.")
@click.option("--resume", is_flag=True, help="Go on from OUT/last.pt with its settings.")
@click.option(
    "--accept-changes", is_flag=True,
    help="With --resume: go on even if data, seed or batch are not those of the checkpoint.",
)  # fmt: skip
@click.option("--print-config", is_flag=True, help="Print all settings as TOML; do not train.")
@click.option("--tensorboard/--no-tensorboard", default=None, help="Default: if it is installed.")
@TOKEN_CACHE
def train(
    preset: str | None, config_file: Path | None, source: Path | None, overrides: tuple[str, ...],
    data: tuple[str, ...], valid: tuple[str, ...], out: Path | None, resume: bool,
    accept_changes: bool, print_config: bool, tensorboard: bool | None, token_cache: Path,
) -> None:  # fmt: skip
    """Train a model. Writes config.toml, last.pt, best.pt and history.jsonl to OUT.

    The settings are those of --preset or of a whole --config (docs/SETTINGS.md has all), then
    what --config and --set change. On several GPUs: torchrun --nproc-per-node N -m bitskip train
    """
    changes = parse_overrides(overrides)
    for name, places in (("data", data), ("valid", valid)):
        if places:
            changes["train"][name] = list(places)
    if out is None and (resume or not print_config):
        raise ConfigError("--out is missing: the folder of the run")
    if source is not None and (preset or resume):
        raise ConfigError(f"--from: not beside {'--preset' if preset else '--resume'}")
    begun = None if source is None else read_folder(source)
    if print_config:
        from bitskip_train.described import to_toml

        model, settings, _ = _settings(preset, config_file, changes, out if resume else None, begun)
        click.echo(to_toml(model, settings), nl=False)
        return
    from bitskip_train.run_folder import locked

    assert out is not None
    main = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one writes
    with locked(out) if main else nullcontext():
        if not resume and (out / "last.pt").exists():
            raise ConfigError(
                f"{out / 'last.pt'} exists: add --resume to go on, or choose another --out"
            )
        model, settings, checkpoint = _settings(
            preset, config_file, changes, out if resume else None, begun
        )
        stopped_by = _run(
            model, settings, out, checkpoint, tensorboard, token_cache, accept_changes, begun
        )
    if stopped_by is not None:
        click.echo(f"stopped; go on with: bitskip train --resume --out {out}", err=True)
        sys.exit(128 + stopped_by)


def _settings(
    preset: str | None, config_file: Path | None, changes: Tables, resumed: Path | None,
    begun: Folder | None,
) -> tuple[ModelConfig, TrainConfig, Checkpoint | None]:  # fmt: skip
    """The settings of a run, and the checkpoint it goes on from. begun: the folder of --from."""
    checkpoint: Checkpoint | None = None
    tables = read_toml(config_file) if config_file else {}
    if resumed is not None:
        from bitskip_train.checkpoint import load_checkpoint

        if preset or config_file:
            raise ConfigError("--resume: takes its settings from OUT/last.pt; change them by --set")
        checkpoint = load_checkpoint(resumed / "last.pt")
        base = (checkpoint.config, TrainConfig.from_dict(checkpoint.train))
    elif begun is not None:
        settings = TrainConfig()
        if begun.tokenizer is not None:
            settings = settings.replace(tokenizer=str(begun.tokenizer))
        base = apply((begun.config, settings), tables)
    elif preset is not None:
        base = apply(recipe(preset), tables)
    elif config_file is not None:
        base = whole(tables, config_file)
    else:
        known = ", ".join(RECIPES)
        raise ConfigError(f"--preset, --config or --from is missing; presets: {known}")
    model, settings = apply(base, changes)
    if begun is not None:
        from bitskip_train.warm_start import check_config

        check_config(model, begun.config)
    if checkpoint is not None:
        if model != checkpoint.config:
            raise ConfigError("--resume: the model's settings cannot change")
        for name in ("tokenizer", "init"):
            if getattr(settings, name) != getattr(base[1], name):
                raise ConfigError(
                    f"--resume: {name} cannot change; the checkpoint holds what it made"
                )
    check_settings(model, settings)
    return model, settings, checkpoint


def _run(
    model: ModelConfig, settings: TrainConfig, out: Path, checkpoint: Checkpoint | None,
    tensorboard: bool | None, cache: Path, accept_changes: bool, begun: Folder | None,
) -> int | None:  # fmt: skip
    """Load the data and train; the signal that stopped it, None at the end."""
    from bitskip_train.data import TextSource, load_split
    from bitskip_train.memory import keep_freed_memory
    from bitskip_train.tokenizer import make_tokenizer, parse_tokenizer
    from bitskip_train.trainer import Trainer
    from bitskip_train.world import World

    keep_freed_memory()
    if not settings.data:
        raise ConfigError("--data is missing")
    world = World.from_environment()
    try:
        source = TextSource(settings.data, "train")
        text = checkpoint.tokenizer_json if checkpoint is not None else None
        if text is None and world.main:
            text = make_tokenizer(settings.tokenizer, source.documents()).json
        tokenizer = parse_tokenizer(world.share(text), "the tokenizer")
        if begun is None:
            first = None
            _check_vocabulary(model, tokenizer)
        else:
            model, first = _begin(model, begun, tokenizer)
        split = load_split(source, tokenizer, cache)
        held_out = None
        if settings.valid:
            held_out = load_split(TextSource(settings.valid, "validation"), tokenizer, cache)
        if settings.pad_documents:
            end = cast(int, tokenizer.token_id(END_OF_TEXT))
            split = split.padded(settings.context, end)
            held_out = held_out and held_out.padded(settings.context, end)
        trainer = Trainer(
            model, settings, split, held_out, tokenizer.json, out, checkpoint, world,
            accept_changes, first,
        )  # fmt: skip
        if world.main:
            parameters = sum(p.numel() for p in trainer.model.parameters())
            click.echo(
                f"{parameters:,} parameters, {len(split.tokens):,} tokens of data, "
                f"{world.size} x {trainer.device.type}, {_threads(trainer)}, "
                f"steps {trainer.step}..{settings.steps}",
                err=True,
            )
        trainer.run(tensorboard)
        return trainer.stopped_by
    finally:
        world.close()


def _begin(
    model: ModelConfig, begun: Folder, tokenizer: Tokenizer
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Settings and first weights of a run that begins with a folder's; a vocabulary that no
    setting changed is the tokenizer's where that is another."""
    from bitskip_train.tokenizer import parse_tokenizer
    from bitskip_train.warm_start import first_weights

    if begun.tokenizer is None:
        raise ConfigError(f"{begun.path}: has no tokenizer, which says what its rows are")
    old = parse_tokenizer(read_text(begun.tokenizer), str(begun.tokenizer))
    if tokenizer.json != old.json and model.vocab_size == begun.config.vocab_size:
        model = model.replace(vocab_size=tokenizer.size)
    _check_vocabulary(model, tokenizer)
    return model, first_weights(model, begun, tokenizer, old)


def _check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError for a token that the model has no row for."""
    if tokenizer.size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.size} tokens, the model {model.vocab_size}: "
            f"--set model.vocab_size={tokenizer.size}"
        )


def _threads(trainer: Trainer) -> str:
    """How many threads train, and what was measured."""
    count = trainer.train.threads
    text = f"{count} thread{'s' if count > 1 else ''}"
    if trainer.thread_times:
        times = (f"{n}: {s * 1000:.0f} ms" for n, s in sorted(trainer.thread_times.items()))
        text += f" (a pass takes with {', '.join(times)})"
    return text


@click.command()
@_checkpoint
@click.option("--text", multiple=True, required=True, help="As --data of train.")
@exit_layer("exits", Listed(COUNT), "Blocks to run before the head. Default: all.", "N,N,...")
@click.option(
    "--bypass", type=click.Choice(["none", "weights", "activations"]), default="none",
    help="Leave weights, or weights and activations, in full precision.",
)  # fmt: skip
@click.option(
    "--ctx", "--context", "context", type=click.IntRange(2), help="Default: as in training."
)
@click.option("--batch", type=COUNT, default=8, show_default=True, help="Windows side by side.")
@_device_option
@JSON
@TOKEN_CACHE
def evaluate(
    checkpoint: Path, text: tuple[str, ...], exits: list[int] | None, bypass: str,
    context: int | None, batch: int, device: str, as_json: bool, token_cache: Path,
) -> None:  # fmt: skip
    """Loss, perplexity and bits per byte of a CHECKPOINT on held-out text, per exit."""
    from bitskip_train import evaluate as evaluation
    from bitskip_train.checkpoint import load_checkpoint
    from bitskip_train.data import TextSource, load_split
    from bitskip_train.model import BitskipModel
    from bitskip_train.threads import use_threads
    from bitskip_train.tokenizer import parse_tokenizer
    from bitskip_train.trainer import pick_device

    loaded = load_checkpoint(checkpoint)
    if loaded.tokenizer_json is None:
        raise CheckpointError(f"{checkpoint}: holds no tokenizer")
    settings = TrainConfig.from_dict(loaded.train)
    use_threads(settings)
    context = context or settings.context
    if context > loaded.config.max_position_embeddings:
        raise ConfigError(
            f"--context {context}: must be at most {loaded.config.max_position_embeddings}, the "
            "positions that the model holds"
        )
    tokenizer = parse_tokenizer(loaded.tokenizer_json, str(checkpoint))
    split = load_split(TextSource(text, "validation"), tokenizer, token_cache)
    model = BitskipModel.restored(loaded)
    results = evaluation.evaluate(
        model.to(pick_device(device)), split.tokens, split.bytes, context=context, batch=batch,
        exits=exits or [loaded.config.num_hidden_layers], bypass=bypass,
    )  # fmt: skip
    if as_json:
        about = {"context": context, "stride": context, "bypass": bypass, "step": loaded.step}
        found = [{"exit_layer": n, **loss.facts()} for n, loss in results.items()]
        click.echo(json.dumps({**about, "exits": found}))
        return
    tokens = len(split.tokens) - 1
    click.echo(f"{tokens:,} tokens, context and stride {context}, bypass {bypass}")
    click.echo(f"{'exit':>4} {'loss':>16} {'perplexity':>12} {'bits/byte':>10}")
    for n, r in results.items():
        loss = f"{r.loss:.4f}" + ("" if r.loss_se is None else f" ± {r.loss_se:.4f}")
        click.echo(f"{n:>4} {loss:>16} {r.ppl:>12.4g} {r.bits_per_byte:>10.4f}")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=FILE, metavar="CHECKPOINT...")
@_out_option
def average(checkpoints: tuple[Path, ...], out: Path) -> None:
    """Write a checkpoint with the mean of the weights of several, of runs with a common start.

    It can be evaluated, given gates and exported, not resumed.
    """
    from bitskip_train import checkpoint

    loaded = [checkpoint.load_checkpoint(path) for path in checkpoints]
    checkpoint.save_checkpoint(out, checkpoint.average(loaded))


@click.command("fit-gates")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--out", "-o", required=True, type=NEW_FILE, help="Checkpoint or folder to write.")
@click.option(
    "--data", multiple=True, required=True,
    help="Text as in training, but held back from it (on seen text exits fall behind more).",
)  # fmt: skip
@click.option(
    "--layers", type=Listed(COUNT), metavar="N,N,...",
    help="After which blocks. Default: after all but the last.",
)  # fmt: skip
@click.option(
    "--scale", type=Finite(0, min_open=True), default=0.1, show_default=True,
    help="Nats. At threshold 0.5 a gate stops where that should cost less than about 0.7 of it.",
)  # fmt: skip
@click.option("--steps", type=COUNT, default=1500, show_default=True, help="Of fitting.")
@click.option("--batch", type=COUNT, default=4, show_default=True, help="Windows side by side.")
@click.option(
    "--seed", type=WHOLE, default=0, show_default=True, help="Of first weights and order."
)
@_device_option
@TOKEN_CACHE
def fit_gates(
    checkpoint: Path, out: Path, data: tuple[str, ...], layers: list[int] | None, scale: float,
    steps: int, batch: int, seed: int, device: str, token_cache: Path,
) -> None:  # fmt: skip
    """Give a trained CHECKPOINT, or a model folder, routing gates; other weights stay as they are.

    A checkpoint written so can be evaluated and exported, not resumed.
    """
    import torch

    from bitskip_train import gates
    from bitskip_train.checkpoint import load_checkpoint, save_checkpoint
    from bitskip_train.data import TextSource, Windows, load_split
    from bitskip_train.threads import use_threads
    from bitskip_train.tokenizer import parse_tokenizer
    from bitskip_train.trainer import pick_device

    folder = read_folder(checkpoint) if checkpoint.is_dir() else None
    if folder is None:
        loaded = load_checkpoint(checkpoint)
        settings, words = TrainConfig.from_dict(loaded.train), loaded.tokenizer_json
        model = gates.with_gates(loaded.config, loaded.state)
        model.reading = settings
    else:
        room = folder.config.max_position_embeddings
        settings = TrainConfig(context=min(folder.trained_context or 512, room), dtype="float32")
        words = read_text(folder.tokenizer) if folder.tokenizer else None
        model = gates.of_folder(folder.config, folder.tensors)
    use_threads(settings)
    if words is None:
        raise CheckpointError(f"{checkpoint}: holds no tokenizer")
    tokenizer = parse_tokenizer(words, str(checkpoint))
    split = load_split(TextSource(data, "train"), tokenizer, token_cache)
    windows = Windows(split.tokens, settings.context, seed)
    model.to(pick_device(device))
    every = max(1, steps // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            click.echo(f"step {step}/{steps} | loss {loss:.4f}", err=True)

    gates.fit_gates(
        model, windows, steps=steps, batch=batch, scale=scale, layers=layers, seed=seed,
        report=report, autocast=torch.bfloat16 if settings.dtype == "bfloat16" else None,
    )  # fmt: skip
    if folder is not None:
        gates.write_gates(folder, out, model)
        return
    fitted = dataclasses.replace(
        loaded, config=model.config, state=model.cpu().state_dict(), optimizer=None
    )
    save_checkpoint(out, fitted)
