"""The verb `serve`. Only click is imported here: `--help` must answer at once."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from bitskip.options import COUNT, FILE, MODEL, THREADS, WHOLE, kv_cache_or
from bitskip.signals import Terminated
from bitskip_cpu.cli.loading import load_model
from bitskip_serve.config_file import CONFIG

UNITS = {"K": 10, "M": 20, "G": 30}


class Size(click.ParamType):
    """Bytes: a number, with K, M or G for powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """The number of bytes."""
        text = str(value).upper().removesuffix("B").removesuffix("I")
        unit = UNITS.get(text[-1:], 0)
        try:
            size = int(float(text[:-1] if unit else text) * (1 << unit))
        except (ValueError, OverflowError):
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size: write bytes, or 500M, 2G", param, ctx)
        return size


@click.command(context_settings={"auto_envvar_prefix": "BITSKIP_SERVE"})
@MODEL
@CONFIG
@click.option("--host", default="127.0.0.1", show_default=True, envvar="BITSKIP_HOST",
              help="0.0.0.0 to be reached from other machines.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
              envvar="BITSKIP_PORT", help="0: any that is free.")  # fmt: skip
@click.option("--api-key", "keys", multiple=True, envvar="BITSKIP_API_KEY",
              help="Wanted of every client; several may be given.")  # fmt: skip
@click.option("--api-key-file", type=FILE, help="The same, a key a line.")
@click.option("--alias", help="The model's name for clients. Default: its folder's.")
@click.option("--parallel", type=COUNT, default=8, show_default=True,
              help="Texts that run at once; others wait.")  # fmt: skip
@click.option("--rows", type=COUNT, default=64, show_default=True,
              help="Tokens of a step, at most: a long prompt takes several steps.")  # fmt: skip
@click.option("--queue", type=WHOLE, default=64, show_default=True,
              help="Texts that may wait; more are refused (503).")  # fmt: skip
@click.option("--kv-memory", type=Size(), default="2G", show_default=True,
              help="For keys and values of all texts, those kept for later too.")  # fmt: skip
@click.option("--timeout", type=click.IntRange(1), default=3600, show_default=True,
              help="Seconds after which a text ends, its wait among them.")  # fmt: skip
@click.option("--grace", type=WHOLE, default=30, show_default=True,
              help="Seconds that texts have to end when the server is stopped.")  # fmt: skip
@click.option("--cors-origin", "origins", multiple=True,
              help="Pages of other hosts that may ask: https://their.name; * for all.")  # fmt: skip
@kv_cache_or("int8")
@THREADS
@click.option("--quiet", "-q", is_flag=True, help="Print nothing.")
def serve(
    model: str | None, host: str, port: int, keys: tuple[str, ...], api_key_file: Path | None,
    alias: str | None, parallel: int, rows: int, queue: int, kv_memory: int, timeout: int,
    grace: int, origins: tuple[str, ...], kv_cache: str | None, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Serve MODEL over HTTP: OpenAI's API, and a page to look at it.

    Texts of all clients run side by side, and none depends on what else runs.
    """
    import starlette  # noqa: F401  # if it is missing, better said before the model is loaded
    import uvicorn  # noqa: F401

    from bitskip_cpu.many.scheduler import Scheduler
    from bitskip_serve.app import Limits, Service
    from bitskip_serve.http_server import server

    if api_key_file is not None:
        lines = api_key_file.read_text("utf-8").splitlines()
        keys += tuple(line.strip() for line in lines if line.strip())
    if any(not key.isascii() or not key.isprintable() or key != key.strip() for key in keys):
        raise click.UsageError("an API key must be printable ASCII, without spaces around it")
    if api_key_file is not None and not keys:
        raise click.UsageError(f"{api_key_file} holds no key")
    with _listen(host, port) as listening:
        loaded = load_model(model, threads, quiet, kv_cache, "int8")
        scheduler = Scheduler(loaded, parallel=parallel, rows=rows, queue=queue, memory=kv_memory)
        name = alias or loaded.folder.path.resolve().name
        service = Service(
            loaded, scheduler, name=name, keys=keys, origins=origins,
            limits=Limits(seconds=float(timeout)),
        )  # fmt: skip

        def announce() -> None:
            address, bound = listening.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            if not quiet:
                click.echo(f"{name}: http://{shown}:{bound}/ (Ctrl-C stops it)", err=True)

        with suppress(KeyboardInterrupt, Terminated):  # the usual end: all was brought to its own
            server(service, grace, announce).run(sockets=[listening])
        if not quiet:
            click.echo("stopped", err=True)


def _listen(host: str, port: int) -> socket.socket:
    """A socket on which clients may come. Raises OSError, with the address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another "
            "--port or --host"
        ) from None
