"""Loading a MODEL argument, and compiling the kernels first where they never were."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from bitskip.terminal import animated, progress_bar

if TYPE_CHECKING:
    from bitskip_cpu.model import Model


def load_model(
    model: str | None, threads: int | None, quiet: bool = False, kv_cache: str | None = None,
    usual_cache: str = "float32",
) -> Model:  # fmt: skip
    """A MODEL argument, loaded. What is no model is refused before anything is compiled.

    kv_cache, usual_cache: as in `bitskip_cpu.load`.
    """
    import bitskip_cpu
    from bitskip_cpu import models

    path = models.resolve(model)
    prepare(quiet)
    return bitskip_cpu.load(path, threads, kv_cache=kv_cache, usual_cache=usual_cache)


def prepare(quiet: bool = False) -> None:
    """Load the kernels; where they must be compiled first, say so on standard error."""
    from bitskip_cpu.compiling import KERNELS, cache_refusal, warmup

    if quiet or KERNELS.compiled:
        warmup()
        return
    if not animated(sys.stderr):
        click.echo("compiling kernels, once on this machine: 10 to 40 seconds", err=True)
    done = 0.0
    with progress_bar("compiling kernels, once on this machine", 1.0) as advance:

        def reached(share: float) -> None:
            nonlocal done
            advance(share - done)
            done = share

        warmup(reached)
    if KERNELS.directory is None:
        click.echo(f"the kernels are not kept: {cache_refusal()}", err=True)
