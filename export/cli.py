"""The verbs `export` and `verify`. What is heavy is imported when a verb runs, not for --help."""

from __future__ import annotations

from pathlib import Path

import click

from bitskip.errors import not_installed
from bitskip.options import COUNT, FILE, KV_CACHE, MODEL, WHOLE, Listed, Word, exit_layer
from bitskip_ref.cache import KV_CACHES
from bitskip_ref.config import CHOICES


def _engines() -> list[str]:
    from bitskip_export.verify import ENGINES

    return list(ENGINES)


@click.command()
@click.argument("model")
@click.option(
    "--out", "-o", type=click.Path(path_type=Path),
    help="Folder to write. Default: the checkpoint's name without .pt; for a model folder, its "
    "subfolder onnx.",
)  # fmt: skip
@click.option(
    "--head", type=click.Choice(CHOICES["head_format"]),
    help="How embedding and head are stored. Default: as trained for.",
)  # fmt: skip
@click.option("--ternary", is_flag=True, help="The weights are -a, 0, a already: keep them.")
@click.option(
    "--default-exit", type=COUNT, metavar="N",
    help="Exit layer that the folder recommends to `generate`. Default: full depth.",
)  # fmt: skip
@click.option(
    "--by-frequency", type=FILE, metavar="TEXT",
    help="Number tokens by how common they are in a text: for `generate --draft-vocab`.",
)  # fmt: skip
@click.option("--onnx", is_flag=True, help="Write ONNX graphs too, into OUT/onnx.")
@exit_layer(
    "exits", Listed(COUNT), "Exits to write as ONNX graphs, one each. Default: full depth.",
    "N,N,...",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(KV_CACHES),
    help="Keys and values of ONNX graphs. Default: float32.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Write into a folder that holds other files.")
def export(
    model: str, out: Path | None, head: str | None, ternary: bool, default_exit: int | None,
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
    if onnx:
        import bitskip_export.onnx_files  # noqa: F401  if it is missing, nothing is written
    path = Path(model)
    if path.is_file():
        _pack(path, out, head, ternary, default_exit, by_frequency, force)
        out, path = None, out or path.with_suffix("")
    elif path.suffix == ".pt":
        raise ValueError(f"{model}: no such checkpoint")
    else:
        from bitskip_cpu import models

        path = models.resolve(model)
        if not onnx:
            raise click.UsageError(f"{model} is a model folder, not a checkpoint: add --onnx")
        if head or ternary or default_exit or by_frequency:
            raise click.UsageError(
                "--head, --ternary, --default-exit and --by-frequency are for checkpoints"
            )
        if out is None and path.parent == models.HERE:
            raise click.UsageError(f"{model} comes with the package: say where to write with --out")
    if onnx:
        from bitskip_export.onnx_files import write_onnx

        for graph in write_onnx(path, out or path / "onnx", exits, kv_cache or "float32"):
            click.echo(graph)


def _pack(
    checkpoint: Path, out: Path | None, head: str | None, ternary: bool, default_exit: int | None,
    by_frequency: Path | None, force: bool,
) -> None:  # fmt: skip
    from bitskip_export.pack import export_checkpoint
    from bitskip_export.report import summary

    if out is None and not checkpoint.suffix:
        raise click.UsageError(f"{checkpoint} has no suffix to leave out: give a folder with --out")
    root = export_checkpoint(
        checkpoint, out or checkpoint.with_suffix(""), head_format=head, ternary=ternary,
        exit_layer=default_exit, by_frequency=by_frequency, force=force,
    )  # fmt: skip
    click.echo(f"{root}\n\n{summary(root)}")


@click.command()
@MODEL
@click.option(
    "--engines", type=Listed(Word("engine", _engines)), metavar="NAME,NAME,...",
    help="Of ref, torch, numba, onnx. Default: all, and a missing one is a failure.",
)  # fmt: skip
@exit_layer("exits", Listed(COUNT), "Default: the first, the middle and the last.", "N,N,...")
@click.option("--prompt", "-p", help="Text to run; needs the model's tokenizer.")
@click.option("--tokens", type=COUNT, default=12, show_default=True, help="Random tokens to run.")
@click.option("--seed", type=WHOLE, default=0, show_default=True)
@click.option(
    "--threads", "-t", type=Listed(COUNT), default="1,2", show_default=True, metavar="N,N,...",
    help="Numbers of threads to run each engine with.",
)  # fmt: skip
@KV_CACHE
def verify(
    model: str | None, engines: list[str] | None, exits: list[int] | None, prompt: str | None,
    tokens: int, seed: int, threads: list[int], kv_cache: str,
) -> None:  # fmt: skip
    """Run every engine on the same tokens of MODEL, a folder, and compare with the reference.

    Every stage of every block must have the same bits. Exit code 1 if one differs.
    """
    import numpy as np

    from bitskip_cpu import models
    from bitskip_export import verify as checks
    from bitskip_ref.folder import read_folder

    folder = read_folder(models.resolve(model))
    config = folder.config
    if prompt is None:
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, tokens).tolist()
    elif folder.tokenizer is None:
        raise ValueError(f"{folder.path} has no tokenizer for --prompt: use --tokens N")
    else:
        from bitskip_text.tokenizer import read_tokenizer

        ids = read_tokenizer(folder.tokenizer, config.vocab_size).encode(prompt)
    layers = config.num_hidden_layers
    exits = exits or sorted({1, (layers + 1) // 2, layers})
    half = ", float16 KV cache" if kv_cache == "float16" else ""
    click.echo(f"{len(ids)} tokens of {folder.path}, every stage against the reference{half}")
    click.echo(f"{'engine':<6}  {'threads':>7}  {'exit':>4}  {'fed':<14}  result")
    count = failed = 0
    missing: list[str] = []

    def skip(engine: str, error: ImportError) -> None:
        click.echo(f"{engine:<6}  not compared: {not_installed(error)}")
        missing.append(engine)

    names, absent = (engines, None) if engines else (list(checks.ENGINES), skip)
    for check in checks.verify(folder.path, ids, exits, names, threads, kv_cache, absent):
        place = f"{check.engine:<6}  {check.threads:>7}  {check.exit_layer:>4}  {check.mode:<14}"
        passed = "OK" if check.bound is None else f"within {check.bound:g}"
        click.echo(f"{place}  {passed if check.problem is None else 'DIFFERS'}")
        count += 1
        if check.problem is not None:
            click.echo(f"    {check.problem}")
            failed += 1
    click.echo(f"{count - failed} of {count} comparisons hold")
    if failed:
        raise click.ClickException(f"{failed} comparisons differ")
    if missing:
        rest = ",".join(n for n in names if n not in missing)
        raise click.ClickException(
            f"not compared: {', '.join(missing)}; --engines {rest} says that the others will do"
        )
