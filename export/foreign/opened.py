"""Models of other programs opened, and converted once into the user's cache for any verb."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bitskip.places import user_cache
from bitskip.terminal import progress_bar

if TYPE_CHECKING:
    from bitskip_export.foreign.convert import Progress
    from bitskip_export.foreign.source import Source

CONVERTER = "3"  # raised when what is imported changes: folders in users' caches are made anew
NAME = re.compile("[0-9a-f]{24}")  # of a folder there
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]  # and never a pickle or a program


def open_source(path: Path) -> Source:
    """The reader for what lies there. Raises RefusedError."""
    from bitskip_export.foreign.hf_read import read_huggingface
    from bitskip_export.foreign.source import RefusedError

    if path.is_file() and path.suffix == ".gguf":
        from bitskip_export.foreign.gguf_read import read_gguf

        return read_gguf(path)
    if not path.is_dir():
        raise RefusedError(
            f"{path}: neither a Hugging Face folder, nor owner/name of one, nor a file *.gguf"
        )
    if (path / "config.json").is_file() and _is_ours(path):
        raise RefusedError(f"{path} is a model folder of bitskip already")
    return read_huggingface(path)


def _is_ours(path: Path) -> bool:
    from bitskip_export.foreign.safetensors_shards import read_json

    return read_json(path / "config.json").get("model_type") == "bitskip"


def cached(path: Path) -> Path:
    """The model folder of another program's model, converted once into the user's cache.

    It is found by the content of the files; what was hashed before is known by its times.
    """
    import click

    from bitskip_export.foreign.convert import import_model, usual
    from bitskip_ref.files import replace_file

    root = user_cache() / "models"
    files = sorted(_parts(path))
    facts = _facts(files)
    known = root / f"seen-{hashlib.sha256(repr((CONVERTER, facts)).encode()).hexdigest()[:24]}"
    if known.is_file() and NAME.fullmatch(name := known.read_text("ascii", "replace")):
        folder = root / name
        if (folder / "config.json").is_file():
            return folder
    digest = hashlib.sha256(CONVERTER.encode())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    folder = root / digest.hexdigest()[:24]
    if not (folder / "config.json").is_file():
        source = open_source(path)
        click.echo(f"{path}: converted once, kept in {folder}", err=True)
        with bar("converting") as progress:
            report = import_model(source, folder, linear=usual(source), progress=progress)
        if _facts(files) != facts:  # what was written is not what was hashed
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(f"{path}: changed while it was read: try again when it is whole")
        for line in report.lines():
            click.echo(line, err=True)
    with suppress(OSError), replace_file(known) as made:  # a cache may be there only to be read
        made.write(folder.name.encode("ascii"))
    return folder


def _parts(path: Path) -> Iterator[Path]:
    """The files that a model consists of."""
    if path.is_file():
        yield path
        return
    for pattern in HUB_FILES:
        yield from (file for file in path.glob(pattern) if file.is_file())


def _facts(files: list[Path]) -> list[tuple[str, int, int, int, int]]:
    """What the system says of files: other where their content is, whatever their dates say."""
    return [
        (str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
        for f in files
    ]


@contextmanager
def bar(what: str) -> Iterator[Progress]:
    """A bar on standard error, in bytes."""
    with progress_bar(what, 1.0) as advance:
        before = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal before
            advance(done / total - before)
            before = done / total

        yield progress
