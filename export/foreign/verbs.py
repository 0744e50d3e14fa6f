"""The verb `import`, and what `export` does for other programs."""

from __future__ import annotations

import re
from pathlib import Path

import click

from bitskip.options import FOLDER
from bitskip_export.foreign.opened import HUB_FILES, bar, open_source
from bitskip_ref.config import CHOICES
from bitskip_ref.excerpt import one_line

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@click.command("import")
@click.argument("source")
@click.option("--out", "-o", type=FOLDER, required=True, help="The model folder to write.")
@click.option(
    "--linear", type=click.Choice(["int8", "float32"]),
    help="How float weights of linear layers are stored. Default: int8; float32 keeps them as they "
    "are, and takes four times the memory.",
)  # fmt: skip
@click.option(
    "--head", type=click.Choice(CHOICES["head_format"]),
    help="How embedding and head are stored. Default: int8; with --linear float32 as they are.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Write over a folder that holds other files.")
def bring(source: str, out: Path, linear: str | None, head: str | None, force: bool) -> None:
    """Convert SOURCE to a model folder: a Hugging Face folder, owner/name of one, or a GGUF file.

    SOURCE is only read; OUT appears whole or not at all. A model that needs what bitskip has
    not is refused by its name.
    """
    from bitskip_export.foreign.convert import chosen, import_model, usual
    from bitskip_export.pack import check_apart, check_target

    check_target(out, force)
    place = _local(source)
    check_apart(place, out)
    opened = open_source(place)
    linear = linear or usual(opened)
    with bar("importing") as progress:
        report = import_model(
            opened, out, linear=linear, head_format=head, force=force, progress=progress
        )
    c = chosen(opened.config, linear, head)
    click.echo(
        f"{out}: {c.num_hidden_layers} blocks of width {c.hidden_size}, {c.parameters():,} "
        f"parameters, {c.linear} linear weights, context {c.max_position_embeddings}"
    )
    for line in report.lines():
        click.echo(line)
    if c.num_hidden_layers > 1 and opened.exit_layer is None:
        click.echo(
            f"early exits: 1..{c.num_hidden_layers - 1} run, training decides what they are worth: "
            f"`bitskip perplexity {out} --text FILE --exit-layer N,N` says, `fit-exits` fits them"
        )


def _local(source: str) -> Path:
    """A path, or what the hub has under that name, downloaded into its own cache."""
    path = Path(source)
    if path.exists() or not HUB_NAME.fullmatch(source):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)
        raise ValueError(
            f"{source}: no such folder, and not to be had from the hub ({reason})"
        ) from None


def give(to: str, folder: Path, out: Path, exit_layer: int | None, force: bool) -> None:
    """What `export --to hf` and `--to gguf` do with a model folder."""
    from bitskip_export.foreign.gguf_write import write_gguf
    from bitskip_export.foreign.hf_write import write_huggingface
    from bitskip_ref.folder import read_folder

    write = write_gguf if to == "gguf" else write_huggingface

    with bar(f"writing {to}") as progress:
        report = write(
            read_folder(folder), out, exit_layer=exit_layer, force=force, progress=progress
        )
    click.echo(out)
    for line in report.lines():
        click.echo(line)
