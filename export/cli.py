"""The verbs `export` and `verify`. What is heavy is imported when a verb runs, not for --help."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bitskip_ref.cache import KV_CACHES
from bitskip_ref.config import CHOICES
from bitskip_ref.folder import Folder, read_folder


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can mend become one line and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None

    return wrapped


def _numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> list[int] | None:
    """Whole numbers from 1 separated by commas."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: must be numbers from 1, for example 18,24")
    return [int(part) for part in dict.fromkeys(parts)]


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path),
    help="Folder to write. Default: the checkpoint's name without .pt; for a model folder, its "
    "subfolder onnx.",
)  # fmt: skip
@click.option(
    "--head", type=click.Choice(CHOICES["head_format"]),
    help="How embedding and head are stored. Default: as trained for.",
)  # fmt: skip
@click.option("--ternary", is_flag=True, help="The weights are -a, 0, a already: keep them.")
@click.option(
    "--default-exit", type=click.IntRange(1), metavar="N",
    help="Exit layer that the folder recommends to `generate`. Default: full depth.",
)  # fmt: skip
@click.option(
    "--by-frequency", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="TEXT",
    help="Number tokens by how common they are in a text: for `generate --draft-vocab`.",
)  # fmt: skip
@click.option("--onnx", is_flag=True, help="Write ONNX graphs too, into OUT/onnx.")
@click.option(
    "--exit-layer", "exits", callback=_numbers, metavar="N,N,...",
    help="Exits to write as ONNX graphs, one each. Default: full depth.",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(KV_CACHES),
    help="Keys and values of ONNX graphs. Default: float32.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Write into a folder that holds other files.")
@_one_line_errors
def export(
    model: Path, out: Path | None, head: str | None, ternary: bool, default_exit: int | None,
    by_frequency: Path | None, onnx: bool, exits: list[int] | None, kv_cache: str | None,
    force: bool,
) -> None:  # fmt: skip
    """Pack a checkpoint MODEL.pt into a model folder; with --onnx write graphs, also of a folder.

    The checkpoint is only read.
    """
    if exits and not onnx:
        raise click.UsageError("--exit-layer chooses ONNX graphs: add --onnx")
    if kv_cache and not onnx:
        raise click.UsageError("--kv-cache is for ONNX graphs (add --onnx); folders have none")
    if model.is_dir():
        if not onnx:
            raise click.UsageError(f"{model} is a folder, not a checkpoint: add --onnx")
        if head or ternary or default_exit or by_frequency:
            raise click.UsageError(
                "--head, --ternary, --default-exit and --by-frequency are for checkpoints"
            )
        _write_graphs(read_folder(model), out or model / "onnx", exits, kv_cache)
        return
    from bitskip_export.pack import export_checkpoint
    from bitskip_export.report import summary

    if out is None and not model.suffix:
        raise click.UsageError(f"{model} has no suffix to leave out: give a folder with -o")
    root = export_checkpoint(
        model, out or model.with_suffix(""), head_format=head, ternary=ternary,
        exit_layer=default_exit, by_frequency=by_frequency, force=force,
    )  # fmt: skip
    click.echo(f"{root}\n\n{summary(root)}")
    if onnx:
        _write_graphs(read_folder(root), root / "onnx", exits, kv_cache)


def _write_graphs(folder: Folder, out: Path, exits: list[int] | None, kv_cache: str | None) -> None:
    from bitskip_export.onnx_files import write_onnx

    for path in write_onnx(folder, out, exits, kv_cache or "float32"):
        click.echo(path)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--engines", metavar="NAME,NAME,...", help="Of ref, torch, numba, onnx. Default: all."
)
@click.option(
    "--exit-layer", "exits", callback=_numbers, metavar="N,N,...",
    help="Default: the first, the middle and the last.",
)  # fmt: skip
@click.option("--prompt", help="Text to run; needs the model's tokenizer.")
@click.option(
    "--tokens", type=click.IntRange(1), default=12, show_default=True, help="Random tokens to run."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--threads", callback=_numbers, default="1,2", show_default=True, metavar="N,N,...",
    help="Numbers of threads to run each engine with.",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(KV_CACHES), default="float32", show_default=True,
    help="Keys and values of every engine, the reference too.",
)  # fmt: skip
@_one_line_errors
def verify(
    model: Path, engines: str | None, exits: list[int] | None, prompt: str | None, tokens: int,
    seed: int, threads: list[int], kv_cache: str,
) -> None:  # fmt: skip
    """Run every engine on the same tokens of MODEL, a folder, and compare with the reference.

    Every stage of every block must have the same bits. Exit code 1 if one differs.
    """
    import numpy as np

    from bitskip_export import verify as checks

    folder = read_folder(model)
    config = folder.config
    names = engines.split(",") if engines is not None else list(checks.ENGINES)
    if unknown := set(names) - checks.ENGINES.keys():
        raise ValueError(f"unknown engine {min(unknown)!r}; known: {', '.join(checks.ENGINES)}")
    if prompt is None:
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, tokens).tolist()
    elif folder.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer for --prompt: use --tokens N")
    else:
        from bitskip_text.tokenizer import read_tokenizer

        ids = read_tokenizer(folder.tokenizer, config.vocab_size).encode(prompt)
    layers = config.num_hidden_layers
    exits = exits or sorted({1, (layers + 1) // 2, layers})
    half = ", float16 KV cache" if kv_cache == "float16" else ""
    click.echo(f"{len(ids)} tokens of {model}, every stage against the reference{half}")
    click.echo(f"{'engine':<6}  {'threads':>7}  {'exit':>4}  {'fed':<14}  result")
    skipped = click.echo if engines is None else None
    failed = 0
    for check in checks.verify(model, ids, exits, names, threads, kv_cache, skipped):
        place = f"{check.engine:<6}  {check.threads:>7}  {check.exit_layer:>4}  {check.mode:<14}"
        passed = "OK" if check.bound is None else f"within {check.bound:g}"
        click.echo(f"{place}  {passed if check.problem is None else 'DIFFERS'}")
        if check.problem is not None:
            click.echo(f"    {check.problem}")
            failed += 1
    if failed:
        click.echo(f"{failed} comparisons differ", err=True)
        sys.exit(1)
