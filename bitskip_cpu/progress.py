"""What a user sees while kernels compile, which happens once per machine."""

from __future__ import annotations

import sys
import time

import click

from bitskip_cpu.compiling import KERNELS, warmup


def prepare(quiet: bool = False) -> None:
    """Load the kernels; where they must be compiled first, say so on standard error."""
    if quiet or KERNELS.compiled:
        warmup()
        return
    start = time.perf_counter()
    click.echo("compiling kernels, once on this machine, for about 15 seconds ...", err=True)
    warmup(_count if sys.stderr.isatty() else None)
    kept = "" if KERNELS.directory else "; not kept, the cache folder cannot be written"
    click.echo(f"compiled in {time.perf_counter() - start:.0f} s{kept}", err=True)


def _count(done: int) -> None:
    click.echo(f"\r{done} functions\r", err=True, nl=False)
