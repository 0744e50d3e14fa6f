"""What a user sees while something takes its time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from bitskip_cpu.compiling import KERNELS, warmup


def prepare(quiet: bool = False) -> None:
    """Load the kernels; where they must be compiled first, say so on standard error."""
    if quiet or KERNELS.compiled:
        warmup()
        return
    start = time.perf_counter()
    click.echo("compiling kernels, once on this machine, for about 20 seconds ...", err=True)
    warmup(_count if sys.stderr.isatty() else None)
    kept = "" if KERNELS.directory else "; not kept, the cache folder cannot be written"
    click.echo(f"compiled in {time.perf_counter() - start:.0f} s{kept}", err=True)


def _count(done: int) -> None:
    click.echo(f"\r{done} functions\r", err=True, nl=False)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error if that is a terminal; the function given adds to what is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
