"""Loading a MODEL argument, and compiling the kernels first where they never were."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import click

from bitskip.terminal import animated, progress_bar

if TYPE_CHECKING:
    from bitskip_cpu.model import Model
    from bitskip_ref.folder import Folder


def load_model(
    model: str | None, threads: int | None, quiet: bool = False, kv_cache: str | None = None,
    usual_cache: str = "float32", check: Callable[[Folder], object] = lambda _: None,
) -> Model:  # fmt: skip
    """A MODEL argument, loaded. What is no model is refused before anything is compiled.

    kv_cache, usual_cache: as in `bitskip_cpu.load`; check: raises for a model that the verb cannot
    use, before anything is compiled, too.
    """
    from bitskip_cpu import models

    found = models.opened(model, kv_cache, usual_cache)
    check(found.folder)
    from bitskip_cpu.compiling import needed

    prepare(quiet, needed(found.folder.config, found.kv_cache))
    return found.model(threads)


def prepare(quiet: bool = False, names: Collection[str] | None = None) -> None:
    """Load the kernels of these names (None: all of them); where some must be compiled first, say
    so on standard error."""
    from bitskip_cpu.compiling import ARGUMENTS, KERNELS, cache_refusal, warmup

    names = names or ARGUMENTS
    if quiet or not KERNELS.lacking(names):
        warmup(names=names)
        return
    if not animated(sys.stderr):
        click.echo("compiling kernels, once on this machine: 5 to 40 seconds", err=True)
    done = 0.0
    with progress_bar("compiling kernels, once on this machine", 1.0) as advance:

        def reached(share: float) -> None:
            nonlocal done
            advance(share - done)
            done = share

        warmup(reached, names)
    if KERNELS.directory is None:
        click.echo(f"the kernels are not kept: {cache_refusal()}", err=True)
