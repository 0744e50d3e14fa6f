"""The verbs `inspect`, `selftest`, `warmup` and `doctor`. Only click is imported here."""

from __future__ import annotations

import json
import sys

import click

from bitskip.options import JSON, MODEL, THREADS


@click.command()
@MODEL
@JSON
def inspect(model: str | None, as_json: bool) -> None:
    """Shapes, bits, sizes and ternary statistics of a model."""
    from bitskip_cpu import models
    from bitskip_cpu.inspect import describe, inspect

    facts = inspect(models.resolve(model))
    click.echo(json.dumps(facts) if as_json else describe(facts))


@click.command()
@MODEL
@THREADS
def selftest(model: str | None, threads: int | None) -> None:
    """Compare the engine with the reference, bit for bit, on this machine."""
    from bitskip_cpu.cli.loading import prepare
    from bitskip_cpu.selftest import run

    prepare()
    sys.exit(run(model, threads, click.echo))


@click.command()
def warmup() -> None:
    """Compile the kernels now, so that the first `generate` starts at once."""
    from bitskip_cpu.cli.loading import prepare
    from bitskip_cpu.compiling import KERNELS, cache_refusal

    prepare()
    if KERNELS.shipped:
        click.echo("kernels came with the package")
        return
    if KERNELS.directory is None:
        raise ValueError(
            f"nothing was kept: {cache_refusal()}: set BITSKIP_CACHE_DIR to a folder of yours"
        )
    click.echo(f"kernels are ready in {KERNELS.directory}")


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """What this installation runs on, and what is wrong with it."""
    from bitskip_cpu.doctor import describe, doctor

    facts = doctor()
    click.echo(json.dumps(facts) if as_json else describe(facts))
    sys.exit(1 if facts["problems"] else 0)
