"""A verb's options from a TOML file: `--config`. Command line and environment come first."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from bitskip.options import FILE
from bitskip_ref.documents import read_text
from bitskip_ref.excerpt import shown
from bitskip_ref.words import unknown


def _defaults(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make what the file says the defaults of the command. Raises click.UsageError."""
    if path is None:
        return
    known = {_key(p): p for p in ctx.command.params if p.expose_value}
    try:
        stored = tomllib.loads(read_text(path))
    except ValueError as error:
        raise click.UsageError(f"{path}: not a TOML file ({error})") from None
    found: dict[str, Any] = {}
    for key, value in stored.items():
        if key not in known:
            raise click.UsageError(f"{path}: {unknown('key', key[:100], sorted(known))}")
        found[known[key].name or ""] = _checked(f"{path}: {key}", known[key], value)
    ctx.default_map = {**(ctx.default_map or {}), **found}


def _key(param: click.Parameter) -> str:
    """As a file names it: the long option, or the argument."""
    return max(param.opts, key=len).lstrip("-")


def _checked(place: str, param: click.Parameter, value: Any) -> Any:
    """The value as the command line would give it."""

    def text(x: Any) -> str:
        if not isinstance(x, str | int) or isinstance(x, bool):
            raise click.UsageError(f"{place} = {shown(x)}: must be a string or a whole number")
        return str(x)

    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise click.UsageError(f"{place} = {shown(value)}: must be true or false")
        return value
    if param.multiple:
        if not isinstance(value, list):
            raise click.UsageError(f"{place} = {shown(value)}: must be a list")
        return [text(x) for x in value]
    return text(value)


CONFIG = click.option(
    "--config", type=FILE, is_eager=True, expose_value=False, envvar="BITSKIP_CONFIG",
    callback=_defaults,
    help="TOML file with options, named as here without the dashes, and model.",
)  # fmt: skip
