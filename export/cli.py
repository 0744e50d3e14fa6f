"""The verbs `export` and `verify`. What is heavy is imported when a verb runs, not for --help."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bitskip.errors import not_installed
from bitskip.options import (
    COUNT,
    FILE,
    FOLDER,
    KV_CACHE,
    MODEL,
    MODEL_TYPE,
    WHOLE,
    Listed,
    Word,
    exit_layer,
)
from bitskip_ref.config import CHOICES
from bitskip_ref.constants import KV_CACHES


def _engines() -> list[str]:
    from bitskip_export.verify import ENGINES

    return list(ENGINES)


OTHERS = ("onnx", "hf", "gguf", "web")
TARGETS = {  # --to -> what is put behind the model's name where no --out is given
    "folder": "", "onnx": "-onnx", "hf": "-hf", "gguf": ".gguf", "web": "-site",
}  # fmt: skip


@click.command()
@click.argument("model")
@click.option(
    "--to", type=click.Choice(list(TARGETS)),
    help="folder: bitskip's own, of a checkpoint (the default there). onnx: graphs that ONNX "
    "Runtime runs. hf: a folder that Hugging Face's transformers loads. gguf: a file of llama.cpp. "
    "web: a static site that runs the model in a browser.",
)  # fmt: skip
@click.option(
    "--out", "-o", type=click.Path(path_type=Path),
    help="What to write. Default: beside MODEL, its name without .pt and with -onnx, -hf, "
    ".gguf or -site.",
)  # fmt: skip
@exit_layer(
    "exits", Listed(COUNT), "Exits to write: so many graphs, or one model. "
    "Default: full depth; of --to web: those trained for.",
    "N,N,...",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(KV_CACHES),
    help="Keys and values of ONNX graphs. Default: float32.",
)  # fmt: skip
@click.option(
    "--head", type=click.Choice(CHOICES["head_format"]),
    help="How a checkpoint's embedding and head are stored. Default: as trained for.",
)  # fmt: skip
@click.option(
    "--ternary", is_flag=True, help="A checkpoint's weights are -a, 0, a already: keep them."
)
@click.option(
    "--default-exit", type=COUNT, metavar="N",
    help="Exit layer that a folder recommends to `generate`. Default: full depth.",
)  # fmt: skip
@click.option(
    "--by-frequency", type=FILE, metavar="TEXT",
    help="Number a checkpoint's tokens by how common they are in a text: for `--draft-vocab`.",
)  # fmt: skip
@click.option(
    "--smooth-head", type=FILE, metavar="TEXT",
    help="Even out what a checkpoint's head of whole numbers reads, as measured on a text: "
    "rounding then changes fewer tokens.",
)  # fmt: skip
@click.option(
    "--packages", type=FOLDER,
    help="Folder with the two archives of npm that a site holds. Default: npm brings them.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Write into a folder that holds other files.")
def export(
    model: str, to: str | None, out: Path | None, exits: list[int] | None, kv_cache: str | None,
    head: str | None, ternary: bool, default_exit: int | None, by_frequency: Path | None,
    smooth_head: Path | None, packages: Path | None, force: bool,
) -> None:  # fmt: skip
    """Write MODEL, a checkpoint or a model folder, for bitskip or for another program.

    MODEL is only read.
    """
    path = Path(model)
    checkpoint = path.is_file()
    if not checkpoint and path.suffix == ".pt":
        raise ValueError(f"{model}: no such checkpoint")
    to = to or ("folder" if checkpoint else None)
    if to is None:
        raise click.UsageError(f"{model} is a model folder: choose --to {' or '.join(OTHERS)}")
    for option, given, fits, rule in (
        ("--head", head, checkpoint, "is for checkpoints"),
        ("--ternary", ternary, checkpoint, "is for checkpoints"),
        ("--default-exit", default_exit, checkpoint, "is for checkpoints"),
        ("--by-frequency", by_frequency, checkpoint, "is for checkpoints"),
        ("--smooth-head", smooth_head, checkpoint, "is for checkpoints"),
        ("--to folder", to == "folder", checkpoint, f"is for checkpoints: {model} is a folder"),
        ("--exit-layer", exits, to != "folder", f"is for --to {' or '.join(OTHERS)}"),
        (
            "--exit-layer with several exits",
            exits and exits[1:],
            to in ("onnx", "web"),
            "is for --to onnx or web",
        ),
        ("--packages", packages, to == "web", "is for --to web"),
        ("--kv-cache", kv_cache, to == "onnx", "is for --to onnx"),
    ):
        if given and not fits:
            raise click.UsageError(f"{option} {rule}")
    if to in ("onnx", "web"):
        import bitskip_export.onnx_files  # noqa: F401  if it is missing, nothing is written
    if not checkpoint:
        from bitskip_cpu import models

        path = models.resolve(MODEL_TYPE.convert(model, None, None))
    from bitskip_export.pack import check_apart

    out = out or _beside(model, path, to)
    check_apart(Path(model), out)
    check_apart(path, out)
    with TemporaryDirectory() as scratch:
        if checkpoint:
            from bitskip_export.pack import export_checkpoint

            path = export_checkpoint(
                path, out if to == "folder" else Path(scratch) / "model", head_format=head,
                ternary=ternary, exit_layer=default_exit, by_frequency=by_frequency,
                smooth_head=smooth_head, force=force,
            )  # fmt: skip
        if to == "folder":
            from bitskip_export.report import summary

            click.echo(f"{path}\n\n{summary(path)}")
        elif to == "onnx":
            from bitskip_export.onnx_files import write_onnx

            for graph in write_onnx(path, out, exits, kv_cache or "float32"):
                click.echo(graph)
        elif to == "web":
            from bitskip_export.web_site import write_site

            page = write_site(path, out, exits, packages, force)
            click.echo(f"{page}\n\nTo look at it: python -m http.server --directory {out}")
        else:
            from bitskip_export.foreign.verbs import give

            give(to, path, out, exits[0] if exits else None, force)


def _beside(model: str, path: Path, to: str) -> Path:
    """Where to write by default."""
    from bitskip_cpu import models

    place = Path(model)
    if place.name in ("", ".."):  # of the folder that one is in
        place = place.resolve()
    if path.parent == models.HERE or not place.exists():
        raise click.UsageError(f"{model} comes with the package: say where to write with --out")
    if path.is_file() and not place.suffix:
        raise click.UsageError(f"{model} has no suffix to leave out: give a folder with --out")
    stem = place.with_suffix("") if path.is_file() else place
    return stem.with_name(stem.name + TARGETS[to])


@click.command()
@MODEL
@click.option(
    "--engines", type=Listed(Word("engine", _engines)), metavar="NAME,NAME,...",
    help="Of ref, torch, numba, onnx. Default: all, and a missing one is a failure.",
)  # fmt: skip
@exit_layer("exits", Listed(COUNT), "Default: the first, the middle and the last.", "N,N,...")
@click.option("--prompt", "-p", help="Text to run; needs the model's tokenizer.")
@click.option("--tokens", type=COUNT, default=12, show_default=True, help="Random tokens to run.")
@click.option("--seed", type=WHOLE, default=0, show_default=True, help="Of the random tokens.")
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
    cache = "" if kv_cache == "float32" else f", {kv_cache} KV cache"
    click.echo(f"{len(ids)} tokens of {folder.path}, every stage against the reference{cache}")
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
